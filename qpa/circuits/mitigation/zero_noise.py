"""zne: zero-noise extrapolation by folding the gates on two qubits.

Every gate g on two qubits becomes g, its inverse, g, which triples its errors and changes nothing else. A line
through the histograms with one and three times the errors gives the one with none: 1.5 of the first less 0.5 of
the second. That widens the shots' noise, and readout errors are not extrapolated.

Source: arXiv 2005.10921, local folding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.mitigation.mitigation import Mitigation, apply_all, frequencies

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

    from qpa.circuits.sources.sampled import SampledSource

FOLDED = "zne.folded"


@final
class ZeroNoise:
    """A line through two strengths of the noise."""

    name: ClassVar[str] = "zne"
    is_of_circuits: ClassVar[bool] = True

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Run the folded circuits with the same angles."""
        return {FOLDED: source.counts(circuit, angles, folded)}

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return one for each circuit."""
        return n_circuits

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Extrapolate, see `Mitigation.correct`."""
        noisier = apply_all(before, frequencies(calibration[FOLDED]), circuit, calibration)
        return 1.5 * measured - 0.5 * noisier


def folded(runs: QuantumCircuit) -> QuantumCircuit:
    """Return the circuit with every gate on two qubits followed by its inverse and itself."""
    changed = runs.copy_empty_like()
    for step in runs.data:
        changed.append(step)
        if len(step.qubits) == 2 and step.operation.name != "barrier":
            changed.append(step.operation.inverse(), step.qubits)
            changed.append(step)
    return changed
