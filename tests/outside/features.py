"""Features from outside: one trained weight for each register, of the number that the register holds."""

from __future__ import annotations

import torch

from qpa.generators.features.kind import FeatureKind, WithoutCircuits
from qpa.generators.features.states import register_numbers


class SlopesKind(FeatureKind):
    """A plane over the registers' numbers, which starts at 1."""

    name = "slopes"
    needs_registers = True

    def n_control(self, room):
        return len(room.registers)

    def build(self, layout, seed, execution):
        registers = layout.features.registers
        numbers = register_numbers(registers, range(2**layout.ansatz.n_qubits))
        return Slopes(torch.tensor(list(numbers), dtype=torch.float32))


class Slopes(WithoutCircuits, torch.nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.zeros(numbers.shape[1]))
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, probabilities):
        return 1 + (self.numbers @ self.slopes)[:, None]
