"""network: a small trained network on the bits of a basis state.

f(x) = 1 + w2 tanh(W1 s + b1), where s holds the bits of x as -1 and 1. W1 is drawn, b1 and w2 start at 0,
so f starts at 1.

Source: ours.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of, state_bits

N_UNITS = 4


@final
class NetworkKind(FeatureKind):
    """The control "network"."""

    name: ClassVar[str] = "network"
    needs_registers: ClassVar[bool] = True

    def n_control(self, room: Room) -> int:
        """Return the numbers of all hidden units, by default of four."""
        n_unit = room.ansatz.n_qubits + 2
        return self.within(room, n_unit, N_UNITS * n_unit) // n_unit * n_unit

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> NetworkFeatures:
        """Return the network of a layout."""
        return NetworkFeatures(layout.ansatz.n_qubits, layout.features.n_control, seed)


NETWORK = NetworkKind()


class NetworkFeatures(WithoutCircuits, nn.Module):
    """One hidden layer of tanh."""

    def __init__(self, n_qubits: int, n_numbers: int, seed: int) -> None:
        super().__init__()
        n_units = n_numbers // (n_qubits + 2)
        drawn = torch.randn(n_qubits, n_units, generator=random_of(seed))
        self.inner = nn.Parameter(drawn / math.sqrt(n_qubits))
        self.biases = nn.Parameter(torch.zeros(n_units))
        self.outer = nn.Parameter(torch.zeros(n_units, 1))
        self.register_buffer("signs", 1 - 2 * state_bits(2**n_qubits, n_qubits), persistent=False)

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, 1]."""
        return 1.0 + torch.tanh(self.get_buffer("signs") @ self.inner + self.biases) @ self.outer
