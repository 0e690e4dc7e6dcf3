"""Larger circuits of RY layers and CNOT chains: Kronecker factors on groups of qubits, and a gather.

The state is a real tensor [n_circuits, 2**n_qubits]. One layer is

1. RY on every qubit: the Kronecker product of the 2x2 rotations, in groups of at most five qubits. A group
   is applied as one batched matrix product that also moves the group's axis to the end; after all groups
   the axes are back in order.
2. CNOT(0,1) .. CNOT(n-2,n-1): the gather new[y] = old[y ^ (y >> 1)] (Gray code), qubit 0 being the most
   significant bit of y.

The backward pass is the adjoint method. RY(t) = exp(t/2 J) with J = [[0, -1], [1, 0]], and the RYs of a layer
commute with J, so dL/dt_k = 1/2 <lambda, J_k psi> with psi the state after the RY layer and lambda its
cotangent; all angles of a group come from one reduced matrix <lambda, psi>.

Source: adjoint differentiation, arXiv 2009.02823; the RY-only form and the gather are ours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpa.circuits.ry_cnot_chain import chain_gather

_MAX_GROUP = 5


class KroneckerChain(torch.autograd.Function):
    """Probabilities float[n_circuits, 2**n_qubits] of angles float[n_circuits, n_layers, n_qubits]."""

    @staticmethod
    def forward(ctx: Any, angles: Tensor) -> Tensor:
        n_circuits, n_layers, n_qubits = angles.shape
        chain = _chain(n_qubits, angles.device)
        rotations = _rotations(angles.transpose(0, 1))
        rotated = angles.new_empty(n_layers, n_circuits, 2**n_qubits)
        _first_layer([group[0] for group in rotations], out=rotated[0])
        for layer in range(1, n_layers):
            state = rotated[layer - 1].index_select(1, chain.gather)
            _apply(state, [group[layer] for group in rotations], out=rotated[layer])
        amplitudes = rotated[-1].index_select(1, chain.gather)
        ctx.save_for_backward(amplitudes, rotated, *rotations)
        return amplitudes.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        amplitudes, rotated, *rotations = ctx.saved_tensors
        n_layers, n_qubits = rotated.shape[0], amplitudes.shape[1].bit_length() - 1
        chain = _chain(n_qubits, amplitudes.device)
        adjoints = torch.empty_like(rotated)
        adjoint = 2.0 * cotangent * amplitudes
        for layer in range(n_layers - 1, 0, -1):
            torch.index_select(adjoint, 1, chain.scatter, out=adjoints[layer])
            adjoint = _apply(adjoints[layer], [group[layer].mT for group in rotations])
        torch.index_select(adjoint, 1, chain.scatter, out=adjoints[0])
        return _angle_gradients(adjoints, rotated).transpose(0, 1)


def _first_layer(groups: list[Tensor], out: Tensor) -> None:
    """Write RYs on |0..0>, the outer product of the groups' first columns, to [n_circuits, 2**n_qubits]."""
    state = groups[0][..., 0]
    for matrix in groups[1:]:
        state = (state[..., :, None] * matrix[..., None, :, 0]).flatten(1)
    out.copy_(state)


def _apply(state: Tensor, groups: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Apply one matrix [n_circuits, d, d] per group of qubits to states [n_circuits, 2**n_qubits]."""
    n_circuits, n_states = state.shape
    for index, matrix in enumerate(groups):
        d = matrix.shape[-1]
        columns = state.view(n_circuits, d, n_states // d).mT
        is_last = index == len(groups) - 1
        target = out.view(n_circuits, n_states // d, d) if is_last and out is not None else None
        state = torch.bmm(columns, matrix.mT, out=target).view(n_circuits, n_states)
    return state


def _rotations(angles: Tensor) -> list[Tensor]:
    """Return RY on all qubits as one matrix [n_layers, n_circuits, d, d] per group of qubits.

    |RY[i, j]| is cos where the bits of i and j agree and sin where they differ, so the Kronecker product
    is the outer product of (cos, sin) vectors, spread by a constant matrix with one sign per column: an exact
    matrix product, and faster than a gather.
    """
    half = 0.5 * angles
    pairs = torch.stack((half.cos(), half.sin()), dim=-1)
    matrices, first = [], 0
    for size in _group_sizes(angles.shape[-1]):
        amplitudes = pairs[..., first, :]
        for qubit in range(first + 1, first + size):
            amplitudes = (amplitudes[..., :, None] * pairs[..., qubit, None, :]).flatten(-2)
        matrix = amplitudes @ _kronecker(size, angles.device, angles.dtype).spread
        matrices.append(matrix.view(*matrix.shape[:-1], 2**size, 2**size))
        first += size
    return matrices


def _angle_gradients(adjoints: Tensor, rotated: Tensor) -> Tensor:
    """Return 1/2 <adjoint, J_k rotated> for all layers and qubits; both are [L, B, 2**n_qubits]."""
    n_layers, n_circuits, n_states = rotated.shape
    gradients, left = [], 1
    for size in _group_sizes(n_states.bit_length() - 1):
        reduced = _reduced(adjoints.flatten(0, 1), rotated.flatten(0, 1), left, 2**size)
        generators = _kronecker(size, rotated.device, rotated.dtype).generators
        gradients.append(reduced.flatten(1) @ generators)
        left *= 2**size
    return torch.cat(gradients, dim=-1).view(n_layers, n_circuits, -1)


def _reduced(a: Tensor, b: Tensor, left: int, d: int) -> Tensor:
    """Return [n, d, d], a and b [n, left * d * right] contracted over left and right."""
    right = a.shape[1] // (left * d)
    if right == 1:
        return torch.bmm(a.view(-1, left, d).mT, b.view(-1, left, d))
    if left > 1:
        a, b = (t.view(-1, left, d, right).transpose(1, 2).flatten(1) for t in (a, b))
    return torch.bmm(a.reshape(-1, d, left * right), b.reshape(-1, d, left * right).mT)


@lru_cache(maxsize=64)
def _group_sizes(n_qubits: int) -> tuple[int, ...]:
    """Split the qubits into the fewest groups of at most five, as even as possible."""
    n_groups = -(-n_qubits // _MAX_GROUP)
    small, n_large = divmod(n_qubits, n_groups)
    return tuple(small + (index < n_large) for index in range(n_groups))


class _Chain(NamedTuple):
    gather: Tensor
    scatter: Tensor


@lru_cache(maxsize=64)
def _chain(n_qubits: int, device: torch.device) -> _Chain:
    """Return the CNOT chain as a gather of states, and its inverse."""
    gather = chain_gather(n_qubits).to(device)
    return _Chain(gather, torch.argsort(gather))


class _Kronecker(NamedTuple):
    spread: Tensor
    generators: Tensor


@lru_cache(maxsize=64)
def _kronecker(size: int, device: torch.device, dtype: torch.dtype) -> _Kronecker:
    """Return constants of a group of qubits, d = 2**size.

    spread [d, d*d] builds the Kronecker product from its absolute values; generators [d*d, size] holds
    J_k/2 of each qubit, raveled.
    """
    states = torch.arange(2**size)
    row, column = states[:, None], states[None, :]
    flips = row ^ column
    bits = torch.arange(size - 1, -1, -1)
    n_negative = (((~row & column)[..., None] >> bits) & 1).sum(-1)
    spread = (states[:, None] == flips.flatten()) * (1 - 2 * (n_negative % 2)).flatten()
    rises = ((row[..., None] >> bits) & 1) - ((column[..., None] >> bits) & 1)
    generators = 0.5 * ((flips[..., None] == (1 << bits)) * rises).flatten(0, 1)
    return _Kronecker(spread.to(device, dtype), generators.to(device, dtype))
