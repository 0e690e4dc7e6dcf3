"""Orthogonal matrices of RY and CZ gates, of any side: columns of circuits, not probabilities.

A circuit of n qubits is RY on every qubit, and then L layers of CZ on the pairs (0,1), (2,3) .., RY on the
qubits of these pairs, CZ on the pairs (1,2), (3,4) .., and RY on those: the simplified two-design. All its
gates are real and orthogonal, and so is the circuit, a matrix of 2**n rows that (2L+1) n - 2L angles give.
Qubit 0 is the most significant bit of a row's number.

A side that is no power of two has two circuits of the largest power of two below it, the first on the first
rows and then the second on the last rows. Each leaves the other rows alone, so their product is orthogonal,
and as they overlap it reaches every row.

Source: Pauli parameterization of Quantum-PEFT, arXiv 2503.05431; the circuit is that of arXiv 2001.00550. For
sides that are no power of two the paper proposes the cosine-sine decomposition; the two circuits are ours, as
they keep the number of angles logarithmic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpa.circuits.sources.rotation_layers import bits_of_states, rotation_matrices


def two_design_qubits(side: int) -> int:
    """Return the qubits of each circuit of a side: the largest power of two within it."""
    return side.bit_length() - 1


def two_design_circuits(side: int) -> int:
    """Return how many circuits a side has: one where it is a power of two, and otherwise two."""
    return 1 if side == 1 << two_design_qubits(side) else 2


def two_design_angles(n_qubits: int, n_layers: int) -> int:
    """Return the number of angles of one circuit, (2L+1) n - 2L."""
    return (2 * n_layers + 1) * n_qubits - 2 * n_layers


def orthogonal_columns(angles: Tensor, side: int, n_columns: int, n_layers: int) -> Tensor:
    """Return the first columns of orthogonal matrices, differentiable by autograd.

    Args:    angles: float[n_matrices, n_circuits, n_angles], radians.
             n_columns: at most as many as the side.
    Returns: float[n_matrices, side, n_columns], orthonormal columns.
    """
    rows = 1 << two_design_qubits(side)
    columns = torch.eye(side, n_columns, dtype=angles.dtype, device=angles.device)
    first = columns[:rows].expand(len(angles), rows, n_columns)
    first = _run(angles[:, 0], first, n_layers)
    if side == rows:
        return first
    rest = columns[rows:].expand(len(angles), side - rows, n_columns)
    last = torch.cat((first[:, side - rows :], rest), dim=1)
    return torch.cat((first[:, : side - rows], _run(angles[:, 1], last, n_layers)), dim=1)


def _run(angles: Tensor, columns: Tensor, n_layers: int) -> Tensor:
    """Apply one circuit to columns, float[n_matrices, 2**n_qubits, n_columns]."""
    n_qubits = two_design_qubits(columns.shape[1])
    groups = rotation_matrices(_placed(angles, n_qubits, n_layers))
    for number in range(2 * n_layers + 1):
        if number:
            columns = columns * _signs(n_qubits, 1 - number % 2).to(columns)[:, None]
        # A group's axis is the first one, and becomes the last: after all of them that of the columns is.
        for group in groups:
            matrix = group[number]
            columns = columns.reshape(len(angles), matrix.shape[-1], -1).mT @ matrix.mT
        columns = columns.reshape(len(angles), -1, 1 << n_qubits).mT
    return columns


def _placed(angles: Tensor, n_qubits: int, n_layers: int) -> Tensor:
    """Return angles by half layer and qubit, float[2 n_layers + 1, n_matrices, n_qubits]; 0 for no gate."""
    placed, n_used = [angles[:, :n_qubits]], n_qubits
    for qubits in [_paired(n_qubits, odd) for _ in range(n_layers) for odd in (0, 1)]:
        here = angles[:, n_used : n_used + len(qubits)]
        placed.append(torch.nn.functional.pad(here, (qubits.start, n_qubits - qubits.stop)))
        n_used += len(qubits)
    return torch.stack(placed)


def _paired(n_qubits: int, odd: int) -> range:
    """Return the qubits of the pairs (0,1), (2,3) .., or where odd is 1 of (1,2), (3,4) .."""
    return range(odd, odd + (n_qubits - odd) // 2 * 2)


def _signs(n_qubits: int, odd: int) -> Tensor:
    """Return float[2**n_qubits], what CZ on all pairs makes of every basis state."""
    bits = bits_of_states(n_qubits)
    qubits = _paired(n_qubits, odd)
    both = bits[:, qubits.start : qubits.stop : 2] & bits[:, qubits.start + 1 : qubits.stop : 2]
    return 1.0 - 2.0 * (both.sum(dim=1) % 2)
