"""projection: a fixed random map of a few trained numbers to the features of all basis states.

f = 1 + P v with P drawn once, float[2**n_qubits, n], of variance 1 / n, and v = 0 at the start.

Source: after TinyLoRA's random projections, as PEFT implements them; the constant 1 is ours, and makes the
        control stronger: without it the start has no gradient of its own direction (docs/results.md).
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of

N_NUMBERS = 128


@final
class ProjectionKind(FeatureKind):
    """The control "projection"."""

    name: ClassVar[str] = "projection"
    needs_registers: ClassVar[bool] = True

    def n_control(self, room: Room) -> int:
        """Return how many numbers are projected."""
        return self.within(room, 1, N_NUMBERS)

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> ProjectedFeatures:
        """Return the projection of a layout."""
        return ProjectedFeatures(2**layout.ansatz.n_qubits, layout.features.n_control, seed)


PROJECTION = ProjectionKind()


class ProjectedFeatures(WithoutCircuits, nn.Module):
    """The fixed map, and what is projected."""

    def __init__(self, n_states: int, n_numbers: int, seed: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(n_numbers))
        drawn = torch.randn(n_states, n_numbers, generator=random_of(seed)) / math.sqrt(n_numbers)
        self.register_buffer("projection", drawn, persistent=False)

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, 1]."""
        return 1.0 + (self.get_buffer("projection") @ self.numbers)[:, None]
