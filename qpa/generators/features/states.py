"""What the numbers of basis states say: their bits, and the numbers that their registers hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qpa.seeds import split_seed


def state_bits(n_states: int, n_bits: int) -> Tensor:
    """Return float32[n_states, n_bits]: the bits of the first states' numbers, most significant first."""
    shifts = torch.arange(n_bits - 1, -1, -1)
    return ((torch.arange(n_states)[:, None] >> shifts) & 1).to(torch.float32)


def register_numbers(registers: Sequence[int], states: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the numbers that the registers of basis states hold.

    Args:    registers: qubits of each, the first with the most significant bits.
    """
    for state in states:
        numbers = []
        for n_qubits in reversed(registers):
            numbers.append(state & ((1 << n_qubits) - 1))
            state >>= n_qubits
        yield tuple(reversed(numbers))


def register_sizes(registers: Sequence[int], states: Sequence[int]) -> list[int]:
    """Return how many numbers of each register are used, counted up to the largest."""
    sizes, n_after = [], sum(registers)
    for n_qubits in registers:
        n_after -= n_qubits
        mask = (1 << n_qubits) - 1
        sizes.append(1 + max((state >> n_after) & mask for state in states))
    return sizes


def random_of(seed: int) -> torch.Generator:
    """Return the random generator of the initial angles, or of what a control has in their place."""
    return torch.Generator().manual_seed(split_seed(seed, "angles"))
