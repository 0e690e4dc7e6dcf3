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

from functools import lru_cache

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
    rotations = _rotations(angles[:, 0], rows, n_layers)
    first = _run(rotations[1:], _columns_of_product(rotations[0], min(rows, n_columns)))
    if side == rows:
        return first
    rest = angles.new_zeros(side - rows, n_columns)
    rest.diagonal(rows).fill_(1)  # of the columns beyond the first circuit, where there are any
    first = torch.nn.functional.pad(first, (0, n_columns - first.shape[2]))
    last = torch.cat((first[:, side - rows :], rest.expand(len(angles), side - rows, n_columns)), dim=1)
    rotations = _rotations(angles[:, 1], rows, n_layers)
    last = _run(rotations[1:], _rotate(rotations[0], last))
    return torch.cat((first[:, : side - rows], last), dim=1)


def _rotations(angles: Tensor, side: int, n_layers: int) -> list[list[Tensor]]:
    """Return for every half layer RY on all qubits, a matrix [n_matrices, d, d] for each group of qubits."""
    groups = rotation_matrices(_placed(angles, two_design_qubits(side), n_layers))
    return [[group[number] for group in groups] for number in range(2 * n_layers + 1)]


def _run(rotations: list[list[Tensor]], columns: Tensor) -> Tensor:
    """Apply half layers, of CZ and RY each, to columns, float[n_matrices, 2**n_qubits, n_columns]."""
    n_qubits = two_design_qubits(columns.shape[1])
    for number, groups in enumerate(rotations):
        columns = _rotate(groups, columns * _signs(n_qubits, number % 2, columns.device))
    return columns


def _rotate(groups: list[Tensor], columns: Tensor) -> Tensor:
    """Apply RY on all qubits to columns."""
    n_matrices, side, _ = columns.shape
    # A group's axis is the first one, and becomes the last: after all of them that of the columns is first.
    for matrix in groups:
        columns = columns.reshape(n_matrices, matrix.shape[-1], -1).mT @ matrix.mT
    return columns.reshape(n_matrices, -1, side).mT


def _columns_of_product(groups: list[Tensor], n_columns: int) -> Tensor:
    """Return the first columns of the Kronecker product of the groups' matrices."""
    *before, columns = groups
    columns = columns[..., :n_columns]
    for matrix in reversed(before):
        n_used = -(-n_columns // columns.shape[1])
        product = matrix[..., :, None, :n_used, None] * columns[..., None, :, None, :]
        columns = product.flatten(-4, -3).flatten(-2, -1)[..., :n_columns]
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


@lru_cache(maxsize=64)
def _signs(n_qubits: int, odd: int, device: torch.device) -> Tensor:
    """Return float32[2**n_qubits, 1], what CZ on all pairs makes of every basis state."""
    bits = bits_of_states(n_qubits)
    qubits = _paired(n_qubits, odd)
    both = bits[:, qubits.start : qubits.stop : 2] & bits[:, qubits.start + 1 : qubits.stop : 2]
    return (1.0 - 2.0 * (both.sum(dim=1, keepdim=True) % 2)).to(device)
