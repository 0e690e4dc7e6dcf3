"""circuit, signed and random: features of the probabilities of circuits.

Those of "circuit" have trained angles, those of "random" stay as drawn. In "signed" the first qubit tells the
sign: a feature is that of the basis state whose first bit is 0, less that of the state whose first bit is 1.

A circuit's feature is the root of the basis state's probability p. Of uniform angles: sqrt(p * 2**n + eps),
less its mean: its gradient variance does not vanish with the number of qubits, and it is finite at p = 0.
If the mean were not subtracted, all features would be positive, every step of a decoder would add up over the
circuits, and the largest stable learning rate would fall with their number. Of windows: the same in units of
a window's own amplitude, so that it is 1 inside and 0 outside, and learning rates do not depend on the number
of circuits.

Source: ours; measured in docs/results.md.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.ansatz import kind_of
from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room
from qpa.generators.features.states import random_of, state_bits
from qpa.serve.features import FEATURE_EPSILON

WINDOW_NOISE = 0.01
"""Standard deviation, in radians, of what is added to angles that put a circuit on its window."""


def root_in_window(probabilities: Tensor, n_inside: float) -> Tensor:
    """Return the feature of probabilities in a window of n_inside basis states, of the same shape."""
    return torch.sqrt(probabilities * n_inside + FEATURE_EPSILON) - math.sqrt(FEATURE_EPSILON)


class CircuitFeatures(nn.Module):
    """The features of circuits, and of the control "random", whose angles are not trained.

    Args:    execution: how the circuits are run.
    """

    def __init__(self, layout: WeightLayout, seed: int, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        self.windows, self.n_qubits = layout.features.windows, layout.ansatz.n_qubits
        self.mean = kind_of(layout.ansatz).feature_mean
        is_trained = layout.features.n_angles(layout.ansatz) > 0
        self.angles = nn.Parameter(_initial_angles(layout, seed), requires_grad=is_trained)

    def run(self) -> Tensor:
        """Run the circuits; return float[n_circuits, 2**n_qubits], connected to the angles."""
        return self.execution.run(self.angles)

    def connect(self, measured: Tensor) -> Tensor:
        """Return what an earlier `run` measured at these angles, connected to them."""
        return self.execution.connect(self.angles, measured)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return float[2**n_qubits, n_circuits] of probabilities float[n_circuits, 2**n_qubits]."""
        if self.windows is None:
            return torch.sqrt(probabilities * 2.0**self.n_qubits + FEATURE_EPSILON).T - self.mean
        n_inside = 2.0 ** (self.n_qubits - self.windows.n_window_qubits)
        return root_in_window(probabilities, n_inside).T


class SignedFeatures(CircuitFeatures):
    """The features of circuits whose first qubit tells the sign."""

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return float[2**n_qubits, n_circuits]; of a first bit of 1 it is the other's negative."""
        plus, minus = super().forward(probabilities).chunk(2)
        return torch.cat((plus - minus, minus - plus))


class CircuitKind(FeatureKind):
    """The probabilities of circuits."""

    name: ClassVar[str] = "circuit"

    def n_control(self, room: Room) -> int:
        """Return 0: what is trained, if anything, is angles."""
        return 0

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> CircuitFeatures:
        """Return the features of a layout's circuits."""
        return CircuitFeatures(layout, seed, execution)


@final
class RandomKind(CircuitKind):
    """The control "random"."""

    name: ClassVar[str] = "random"


@final
class SignedKind(CircuitKind):
    """The probabilities of circuits with a qubit for the sign."""

    name: ClassVar[str] = "signed"
    needs_registers: ClassVar[bool] = True
    n_sign_qubits: ClassVar[int] = 1

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> SignedFeatures:
        """Return the features of a layout's circuits."""
        return SignedFeatures(layout, seed, execution)


CIRCUIT = CircuitKind()
SIGNED = SignedKind()
RANDOM = RandomKind()


def _initial_angles(layout: WeightLayout, seed: int) -> Tensor:
    """Return float32[n_circuits, n_angles], radians: uniform, or each circuit on its window, with noise."""
    windows, random = layout.features.windows, random_of(seed)
    shape = (layout.n_circuits, layout.ansatz.n_angles)
    if windows is None:
        return torch.empty(shape).uniform_(-math.pi, math.pi, generator=random)
    bits = state_bits(layout.n_circuits, windows.n_window_qubits)
    noise = WINDOW_NOISE * torch.randn(shape, generator=random)
    return noise + kind_of(layout.ansatz).window_angles(layout.ansatz, bits)
