"""Layers of RY, perhaps RZ, and two-qubit gates that permute or negate basis states, by plain autograd.

The state is [n_circuits, 2**n_qubits], real where there is no RZ. One layer is

1. RY on every qubit: the Kronecker product of the 2x2 rotations, in groups of at most five qubits. A group is
   one batched matrix product that also moves the group's axis to the end; after all groups the axes are back
   in order.
2. RZ on every qubit: one phase exp(-i/2 sum_q (+-) t_q) for each basis state, minus where qubit q's bit is 1.
3. The two-qubit gates, whatever they are.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MAX_GROUP = 5


def simulate_layers(ry: Tensor, rz: Tensor | None, entangle: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the probabilities of the basis states, differentiable by autograd.

    Args:    ry: float[n_layers, n_circuits, n_qubits], radians.
             rz: the same of RZ, which follows RY; None for circuits without it.
             entangle: applies a layer's two-qubit gates to states [n_circuits, 2**n_qubits], which are real
             without rz and complex with it.
    Returns: float[n_circuits, 2**n_qubits], qubit 0 the most significant bit.
    """
    n_layers, n_circuits, n_qubits = ry.shape
    groups = rotation_matrices(ry)
    state = ry.new_zeros(n_circuits, 2**n_qubits)
    state[:, 0] = 1
    if rz is not None:
        phases = _phases(rz)
        state = state.to(phases.dtype)
        groups = [group.to(phases.dtype) for group in groups]
    for layer in range(n_layers):
        for group in groups:
            matrix = group[layer]
            columns = state.view(n_circuits, matrix.shape[-1], -1).mT
            state = (columns @ matrix.mT).flatten(1)
        if rz is not None:
            state = state * phases[layer]
        state = entangle(state)
    return state.square() if rz is None else state.real.square() + state.imag.square()


def bits_of_states(n_qubits: int) -> Tensor:
    """Return bool[2**n_qubits, n_qubits], the bits of every basis state, the most significant first."""
    index = torch.arange(2**n_qubits)
    return torch.stack([(index & (1 << bit)).bool() for bit in range(n_qubits)[::-1]], dim=1)


def rotation_matrices(angles: Tensor) -> list[Tensor]:
    """Return RY on all qubits as one matrix [n_layers, n_circuits, d, d] for each group of qubits."""
    half = 0.5 * angles
    cos, sin = half.cos(), half.sin()
    single = torch.stack((cos, -sin, sin, cos), dim=-1).view(*angles.shape, 2, 2)
    matrices = []
    for group in single.chunk(-(-angles.shape[-1] // _MAX_GROUP), dim=-3):
        matrix, *others = group.unbind(-3)
        for other in others:
            product = matrix[..., :, None, :, None] * other[..., None, :, None, :]
            matrix = product.flatten(-4, -3).flatten(-2, -1)
        matrices.append(matrix)
    return matrices


def _phases(angles: Tensor) -> Tensor:
    """Return RZ on all qubits, complex[n_layers, n_circuits, 2**n_qubits]."""
    half_signs = bits_of_states(angles.shape[-1]).T.to(angles) - 0.5
    phases = angles @ half_signs
    return torch.complex(phases.cos(), phases.sin())
