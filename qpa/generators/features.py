"""The features of chunks: numbers that depend on a chunk's basis state alone, of circuits or of a control.

Every kind is a module with one parameter, which has a name of its own: `angles` of circuits, the `table` and
the `weights` of controls. `run` gives probabilities, where there are any; the module maps them to features
float[2**n_qubits, n_circuits].

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

import torch
from torch import Tensor, nn

from qpa.circuits.ansatz import kind_of
from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.seeds import split_seed

FEATURE_EPSILON = 0.01

WINDOW_NOISE = 0.01
"""Standard deviation, in radians, of what is added to angles that put a circuit on its window."""


class CircuitFeatures(nn.Module):
    """The features of circuits, and of the control "random", whose angles are not trained.

    Args:    execution: how the circuits are run.
    """

    def __init__(self, layout: WeightLayout, seed: int, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        self.windows, self.n_qubits = layout.features.windows, layout.ansatz.n_qubits
        self.mean = kind_of(layout.ansatz).feature_mean
        is_trained = layout.features.kind == "circuit"
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
        return torch.sqrt(probabilities * n_inside + FEATURE_EPSILON).T - math.sqrt(FEATURE_EPSILON)


class TableFeatures(nn.Module):
    """The control "classical": a trained table, the same for every group of chunks."""

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        self.n_states = 2**layout.ansatz.n_qubits
        self.table = nn.Parameter(_initial_table(layout, seed))

    def run(self) -> None:
        """Return no probabilities."""

    def connect(self, measured: None) -> None:
        """Return no probabilities."""

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, n_columns]."""
        return self.table.repeat_interleave(self.n_states // self.table.shape[1], dim=1).T


class BitFeatures(nn.Module):
    """The control "bits": one trained layer of tanh, which takes the state's bits as -1 and 1, and a 1."""

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        n_qubits = layout.ansatz.n_qubits
        self.weights = nn.Parameter(torch.randn(layout.n_circuits, n_qubits + 1, generator=_random(seed)))
        bits = state_bits(2**n_qubits, n_qubits)
        signed = torch.cat((2 * bits - 1, torch.ones_like(bits[:, :1])), dim=1)
        self.register_buffer("signed_bits", signed, persistent=False)

    def run(self) -> None:
        """Return no probabilities."""

    def connect(self, measured: None) -> None:
        """Return no probabilities."""

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, n_columns]."""
        return torch.tanh(self.get_buffer("signed_bits") @ self.weights.T)


ChunkFeatures = CircuitFeatures | TableFeatures | BitFeatures


def make_features(layout: WeightLayout, seed: int, execution: Execution) -> ChunkFeatures:
    """Return the features of a layout at their initial values."""
    if layout.features.kind == "classical":
        return TableFeatures(layout, seed)
    if layout.features.kind == "bits":
        return BitFeatures(layout, seed)
    return CircuitFeatures(layout, seed, execution)


def state_bits(n_states: int, n_bits: int) -> Tensor:
    """Return float32[n_states, n_bits]: the bits of the first states' numbers, most significant first."""
    shifts = torch.arange(n_bits - 1, -1, -1)
    return ((torch.arange(n_states)[:, None] >> shifts) & 1).to(torch.float32)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(split_seed(seed, "angles"))


def _initial_angles(layout: WeightLayout, seed: int) -> Tensor:
    """Return float32[n_circuits, n_angles], radians: uniform, or each circuit on its window, with noise."""
    windows, random = layout.features.windows, _random(seed)
    shape = (layout.n_circuits, layout.ansatz.n_angles)
    if windows is None:
        return torch.empty(shape).uniform_(-math.pi, math.pi, generator=random)
    bits = state_bits(layout.n_circuits, windows.n_window_qubits)
    noise = WINDOW_NOISE * torch.randn(shape, generator=random)
    return noise + kind_of(layout.ansatz).window_angles(layout.ansatz, bits)


def _initial_table(layout: WeightLayout, seed: int) -> Tensor:
    """Return float32[n_columns, n_entries], normal, or the windows themselves where the layout has them."""
    windows, random = layout.features.windows, _random(seed)
    if windows is None:
        return torch.randn(layout.n_circuits, 2**layout.ansatz.n_qubits, generator=random)
    n_inside = 2**windows.n_chunk_qubits
    inside = torch.eye(layout.n_circuits, 2**windows.n_window_qubits).repeat_interleave(n_inside, dim=1)
    return inside + WINDOW_NOISE * torch.randn(inside.shape, generator=random)
