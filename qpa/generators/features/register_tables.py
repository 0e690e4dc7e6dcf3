"""tables: a sum of products of one trained table for each register of a basis state.

f(x) = sum over t of the product over registers g of a[t, g, x_g], where x_g is the number that the register
holds. The first term starts at 1 everywhere; of the others the first table starts at 0 and the rest are
drawn, so f starts at 1 and every table has a gradient after one step.

Source: ours; the canonical polyadic decomposition, Kolda, Bader, SIAM Review 51 (2009), section 3.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of, register_numbers, register_sizes


@final
class RegisterTablesKind(FeatureKind):
    """The control "tables"."""

    name: ClassVar[str] = "tables"
    needs_registers: ClassVar[bool] = True

    def n_control(self, room: Room) -> int:
        """Return the entries of all tables, by default of one term."""
        n_term = sum(register_sizes(room.registers, room.states))
        return self.within(room, n_term, n_term) // n_term * n_term

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> RegisterTables:
        """Return the tables of a layout."""
        return RegisterTables(layout, seed)


REGISTER_TABLES = RegisterTablesKind()


class RegisterTables(WithoutCircuits, nn.Module):
    """One table float32[n_terms, n_entries] for each register."""

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        registers, random = layout.features.registers, random_of(seed)
        sizes = register_sizes(registers, layout.states)
        n_terms = layout.features.n_control // sum(sizes)
        self.tables = nn.ParameterList()
        for place, size in enumerate(sizes):
            table = torch.randn(n_terms, size, generator=random)
            table[0] = 1.0
            if place == 0:
                table[1:] = 0.0
            self.tables.append(nn.Parameter(table))
        numbers = torch.tensor(list(register_numbers(registers, range(2**layout.ansatz.n_qubits))))
        # Registers have more numbers than are used; what stands there is read by no chunk.
        self.register_buffer("numbers", numbers.minimum(torch.tensor(sizes) - 1), persistent=False)

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, 1]."""
        numbers = self.get_buffer("numbers")
        entries = (table[:, numbers[:, place]] for place, table in enumerate(self.tables))
        product: Tensor = math.prod(entries)
        return product.sum(0)[:, None]
