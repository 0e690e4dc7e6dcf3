"""zne: zero-noise extrapolation by folding the gates on two qubits.

Every gate g on two qubits becomes g, its inverse, g, which triples its errors and changes nothing else. Of a
distribution's distance to the flat one, noise is taken to leave w, and three times the noise w**3. So the
second histogram is the first one's distance times w**2, which gives w without a model of the device; the
first is divided by it. Errors of gates on one qubit and of the readout are not tripled, and stay.

Source: arXiv 2005.10921 for local folding, arXiv 1712.09271 for the exponential.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.mitigation.mitigation import Mitigation, apply_all, frequencies
from qpa.errors import TargetError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

    from qpa.circuits.sources.sampled import SampledSource

FOLDED = "zne.folded"
LEAST_KEPT = 0.05
"""Below this there is no signal to give back."""


@final
class ZeroNoise:
    """An exponential through two strengths of the noise."""

    name: ClassVar[str] = "zne"
    is_of_gates: ClassVar[bool] = True

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Run the folded circuits with the same angles.

        Raises:  TargetError: the inverse of a gate is no gate of the device.
        """
        return {FOLDED: source.counts(circuit, angles, folded)}

    def calls(self, circuit: Circuit, n_circuits: int) -> tuple[int, ...]:
        """Return one call with one run for each circuit."""
        return (n_circuits,)

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Extrapolate with one w for all circuits, see `Mitigation.correct`."""
        counts = calibration[FOLDED]
        flat = 1 / circuit.n_states
        far = apply_all(before, frequencies(counts), circuit, calibration) - flat
        near = measured - flat
        # Shots add to the square of a histogram, but not to the product of two.
        of_shots = (1 - measured.square().sum(1)) / (counts.sum(1) - 1).clamp(min=1)
        square = float(near.square().sum() - of_shots.sum())
        if square <= 0:
            return measured
        left = float((near * far).sum()) / square
        return flat + near / math.sqrt(min(1.0, max(LEAST_KEPT**2, left)))


def folded(runs: QuantumCircuit) -> QuantumCircuit:
    """Return the circuit with every gate on two qubits followed by its inverse and itself.

    Barriers keep whoever runs the circuit from cancelling them.

    Raises:  TargetError: the inverse of a gate is no gate of the same name.
    """
    changed = runs.copy_empty_like()
    for step in runs.data:
        changed.append(step)
        if len(step.qubits) == 2 and step.operation.name != "barrier":
            inverse = step.operation.inverse()
            if inverse.name != step.operation.name:
                expected = "gates on two qubits whose inverses it has, for zne"
                raise TargetError("the device", expected, step.operation.name, "choose another `mitigation`")
            changed.barrier(step.qubits)
            changed.append(inverse, step.qubits)
            changed.barrier(step.qubits)
            changed.append(step)
    return changed
