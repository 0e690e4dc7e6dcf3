"""log-linear: the logarithm of a feature is a sum of trained parities of the bits of a basis state.

f(x) = exp(sum_j w_j chi_j(x)), where chi_j is -1 or 1, the parity of a few bits of x. Their order: single
bits, then pairs of bits by their distance, nearest first, then triples by the width that they span, and so
on. All w start at 0, so f starts at 1. With single bits alone it is a product over the bits, which one layer
of rotations gives too.

Source: ours; a log-linear model, as in Bishop, Holland, Discrete Multivariate Analysis (1975), chapter 2.
"""

from __future__ import annotations

from itertools import islice
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qpa.circuits.execution import Execution
from qpa.documents import WeightLayout
from qpa.generators.features.kind import FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import state_bits
from qpa.serve.features import subsets


@final
class LogLinearKind(FeatureKind):
    """The control "log-linear"."""

    name: ClassVar[str] = "log-linear"
    needs_registers: ClassVar[bool] = True

    def n_control(self, room: Room) -> int:
        """Return the number of parities: by default one for every bit and every pair of neighbours."""
        n_qubits = room.ansatz.n_qubits
        return min(self.within(room, 1, 2 * n_qubits - 1), (1 << n_qubits) - 1)

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> LogLinearFeatures:
        """Return the model of a layout."""
        return LogLinearFeatures(layout.ansatz.n_qubits, layout.features.n_control)


LOG_LINEAR = LogLinearKind()


class LogLinearFeatures(WithoutCircuits, nn.Module):
    """Parities float32[2**n_qubits, n_weights], and the weights float32[n_weights]."""

    def __init__(self, n_qubits: int, n_weights: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(n_weights))
        signs = 1 - 2 * state_bits(2**n_qubits, n_qubits)
        chosen = [signs[:, list(bits)].prod(1) for bits in islice(subsets(n_qubits), n_weights)]
        self.register_buffer("parities", torch.stack(chosen, dim=1), persistent=False)

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, 1]."""
        return torch.exp(self.get_buffer("parities") @ self.weights)[:, None]
