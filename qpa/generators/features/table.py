"""classical: a trained table in the circuits' place.

Source: ours.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features import circuit
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of


@final
class ClassicalKind(FeatureKind):
    """The control "classical": a trained table, the same for every group of chunks."""

    name: ClassVar[str] = "classical"

    def n_control(self, room: Room) -> int:
        """Return the entries of the table: one for every circuit and place of a chunk within a group."""
        windows, n_bits = room.windows, room.ansatz.n_qubits
        if windows is not None:
            n_bits = windows.n_window_qubits + windows.n_chunk_qubits
        return room.n_circuits << n_bits

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> TableFeatures:
        """Return the table of a layout."""
        return TableFeatures(layout, seed)


CLASSICAL = ClassicalKind()


class TableFeatures(WithoutCircuits, nn.Module):
    """A table float32[n_columns, n_entries]."""

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        self.n_states = 2**layout.ansatz.n_qubits
        self.table = nn.Parameter(_initial_table(layout, seed))

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, n_columns]."""
        return self.table.repeat_interleave(self.n_states // self.table.shape[1], dim=1).T


def _initial_table(layout: WeightLayout, seed: int) -> Tensor:
    """Return float32[n_columns, n_entries], normal, or the windows themselves where the layout has them."""
    windows, random = layout.features.windows, random_of(seed)
    if windows is None:
        return torch.randn(layout.n_circuits, 2**layout.ansatz.n_qubits, generator=random)
    n_inside = 2**windows.n_chunk_qubits
    inside = torch.eye(layout.n_circuits, 2**windows.n_window_qubits).repeat_interleave(n_inside, dim=1)
    return inside + circuit.WINDOW_NOISE * torch.randn(inside.shape, generator=random)
