"""constant, tying, shared and own: trained numbers, each of which is the feature of many basis states.

A basis state without a number of its own has the feature 1; all numbers start at 1. The kinds differ in who
shares a number:

* constant: there are no numbers, so that the decoder's scale is all that is trained;
* tying: basis states that a draw puts together (after UniLoRA, arXiv 2506.00799);
* shared: the same module type and band of neighbouring directions in all layers;
* own: nobody; numbers go to the first directions of every module first, and the other directions have 1.

Source: ours, where nothing else is said.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of, register_numbers, register_sizes

N_NUMBERS = 128


class TiedKind(FeatureKind):
    """Numbers that basis states share; `owners` says which."""

    needs_registers: ClassVar[bool] = True

    @abstractmethod
    def owners(self, layout: WeightLayout, states: list[int], seed: int) -> list[int]:
        """Return the index of each state's number, n_control where it has none."""

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> TiedFeatures:
        """Return the numbers of a layout."""
        return TiedFeatures(self.places(layout, seed), layout.features.n_control)

    def places(self, layout: WeightLayout, seed: int) -> Tensor:
        """Return the index of every basis state's number, int64[2**n_qubits]; n_control where it has none."""
        states = layout.states
        places = torch.full((2**layout.ansatz.n_qubits,), layout.features.n_control)
        places[torch.tensor(states)] = torch.tensor(self.owners(layout, states, seed))
        return places


class TiedFeatures(WithoutCircuits, nn.Module):
    """The numbers float32[n_numbers], and the places int64[2**n_qubits] of every state's among them."""

    def __init__(self, places: Tensor, n_numbers: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.ones(n_numbers))
        self.register_buffer("places", places, persistent=False)

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, 1]."""
        return torch.cat((self.numbers, self.numbers.new_ones(1)))[self.get_buffer("places")][:, None]


@final
class ConstantKind(TiedKind):
    """The control "constant"."""

    name: ClassVar[str] = "constant"

    def n_control(self, room: Room) -> int:
        """Return 0."""
        return 0

    def owners(self, layout: WeightLayout, states: list[int], seed: int) -> list[int]:
        """Return that no state has a number."""
        return [0] * len(states)


@final
class TyingKind(TiedKind):
    """The control "tying"."""

    name: ClassVar[str] = "tying"

    def n_control(self, room: Room) -> int:
        """Return how many numbers there are, at most one for every state that is used."""
        return min(self.within(room, 1, N_NUMBERS), len(room.states))

    def owners(self, layout: WeightLayout, states: list[int], seed: int) -> list[int]:
        """Return a draw in which all numbers have equally many states, but for one."""
        order = torch.randperm(len(states), generator=random_of(seed))
        owners: list[int] = (order % layout.features.n_control).tolist()
        return owners


@final
class SharedKind(TiedKind):
    """The control "shared"."""

    name: ClassVar[str] = "shared"

    def n_control(self, room: Room) -> int:
        """Return a number for every module type and band of directions."""
        _, n_types, n_directions = register_sizes(room.registers, room.states)
        n_bands = self.within(room, n_types, N_NUMBERS) // n_types
        return n_types * max(1, min(n_bands, n_directions))

    def owners(self, layout: WeightLayout, states: list[int], seed: int) -> list[int]:
        """Return the number of each state's module type and band."""
        registers = layout.features.registers
        _, n_types, n_directions = register_sizes(registers, states)
        n_bands = layout.features.n_control // n_types
        return [
            module_type * n_bands + direction * n_bands // n_directions
            for _, module_type, direction in register_numbers(registers, states)
        ]


@final
class OwnKind(TiedKind):
    """The control "own"."""

    name: ClassVar[str] = "own"

    def n_control(self, room: Room) -> int:
        """Return how many numbers there are, at most one for every state that is used."""
        return min(self.within(room, 1, N_NUMBERS), len(room.states))

    def owners(self, layout: WeightLayout, states: list[int], seed: int) -> list[int]:
        """Return the rank of each state by its direction, up to the number of numbers."""
        numbers = list(register_numbers(layout.features.registers, states))
        order = sorted(range(len(states)), key=lambda index: (numbers[index][-1], index))
        owners = [0] * len(states)
        for rank, index in enumerate(order):
            owners[index] = min(rank, layout.features.n_control)
        return owners


CONSTANT, TYING, SHARED, OWN = ConstantKind(), TyingKind(), SharedKind(), OwnKind()
