"""depolarizing: what global depolarising noise takes away is given back.

The noise leaves w p + (1 - w) / 2**n_qubits of a distribution p. w is fitted to N_REFERENCES further runs of the
same circuit with angles that are multiples of pi / 2: there it is a Clifford circuit, whose distribution is known
for any number of qubits. The inverse is linear, so what it gives may be negative.

Source: arXiv 2005.10189 (learning from Clifford circuits); the model of noise is that of arXiv 2105.08721.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.mitigation.mitigation import Mitigation, apply_all, frequencies

if TYPE_CHECKING:
    from qpa.circuits.sources.sampled import SampledSource

REFERENCES = "depolarizing.references"
N_REFERENCES = 4
LEAST_KEPT = 0.05
"""Below this there is no signal to give back."""


@final
class Depolarizing:
    """Rescale around the flat distribution."""

    name: ClassVar[str] = "depolarizing"
    is_of_circuits: ClassVar[bool] = False

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Run the circuit with the angles of the references."""
        return {REFERENCES: source.counts(circuit, reference_angles(circuit))}

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return the number of references, for any number of circuits."""
        return N_REFERENCES

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Divide the distance to the flat distribution by w, see `Mitigation.correct`."""
        found = apply_all(before, frequencies(calibration[REFERENCES]), circuit, calibration)
        flat = 1 / circuit.n_states
        exact = circuit.exact_probabilities(reference_angles(circuit)) - flat
        seen = circuit.histogram(found) - flat
        kept = float((exact * seen).sum() / exact.square().sum())
        return flat + (measured - flat) / min(1.0, max(LEAST_KEPT, kept))


def reference_angles(circuit: Circuit) -> Tensor:
    """Return float64[N_REFERENCES, n_angles], multiples of pi / 2, whose distributions are not flat.

    An RY by pi / 2 halves a distribution, so of every circuit's angles about one in 2 n_qubits is odd.
    """
    random = torch.Generator().manual_seed(circuit.n_angles)
    shape = (N_REFERENCES, circuit.n_angles)
    turns = 2 * torch.randint(2, shape, generator=random)
    odd = torch.rand(shape, generator=random) < 1 / circuit.n_angles
    return (turns + odd).double() * (math.pi / 2)
