"""bits: one trained layer on the bits of a basis state, in the circuits' place.

Source: ours.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of, state_bits


@final
class BitsKind(FeatureKind):
    """The control "bits"."""

    name: ClassVar[str] = "bits"

    def n_control(self, room: Room) -> int:
        """Return a weight for every circuit and qubit, and one more for every circuit."""
        return room.n_circuits * (room.ansatz.n_qubits + 1)

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> BitFeatures:
        """Return the layer of a layout."""
        return BitFeatures(layout, seed)


BITS = BitsKind()


class BitFeatures(WithoutCircuits, nn.Module):
    """One trained layer of tanh, which takes the state's bits as -1 and 1, and a 1."""

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        n_qubits = layout.ansatz.n_qubits
        self.weights = nn.Parameter(torch.randn(layout.n_circuits, n_qubits + 1, generator=random_of(seed)))
        bits = state_bits(2**n_qubits, n_qubits)
        signed = torch.cat((2 * bits - 1, torch.ones_like(bits[:, :1])), dim=1)
        self.register_buffer("signed_bits", signed, persistent=False)

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, n_columns]."""
        return torch.tanh(self.get_buffer("signed_bits") @ self.weights.T)
