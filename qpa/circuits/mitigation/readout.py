"""readout: every qubit's readout flips are inverted.

Two circuits are run besides: one measures qubits that were left at 0, the other qubits that were turned to 1.
They tell how often each qubit is read wrongly, and the inverse of that 2 x 2 matrix is applied to the qubit's
axis of the histogram. Errors that depend on two qubits are not seen, and what goes wrong in the turns to 1 is
taken for errors of the readout.

Source: tensored readout error mitigation, arXiv 2006.14044.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.surrogate import with_flips
from qpa.circuits.mitigation.mitigation import Mitigation, frequencies

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

    from qpa.circuits.sources.sampled import SampledSource

ZEROS, ONES = "readout.zeros", "readout.ones"
MAX_FLIP = 0.45
"""A qubit that is read wrongly more often tells nothing."""


@final
class Readout:
    """The tensored inverse."""

    name: ClassVar[str] = "readout"
    is_of_gates: ClassVar[bool] = False

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Measure all qubits at 0, and all at 1."""
        # These circuits have no angles; with two sets of them, a simulator draws for each anew.
        zero, pi = angles.new_zeros(1, circuit.n_angles), angles.new_full((1, circuit.n_angles), math.pi)
        return {
            ZEROS: source.counts(circuit, zero, lambda runs: prepared(runs, circuit, is_one=False)),
            ONES: source.counts(circuit, pi, lambda runs: prepared(runs, circuit, is_one=True)),
        }

    def calls(self, circuit: Circuit, n_circuits: int) -> tuple[int, ...]:
        """Return two calls with one run each, for any number of circuits."""
        return 1, 1

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Invert the flips of each qubit, see `Mitigation.correct`."""
        return without_flips(measured, _flips(calibration[ZEROS], 0), _flips(calibration[ONES], 1))


def without_flips(measured: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Invert the flips of each qubit.

    Args:    measured: float64[n_circuits, 2**n_qubits].
             up: float64[n_qubits], how often 0 is read as 1; down: how often 1 is read as 0.
    Returns: float64[n_circuits, 2**n_qubits], whose rows have the same sums and may have negative numbers.
    """
    # The inverse of [[1 - up, down], [up, 1 - down]] is such a matrix too, with negative flips.
    kept = 1 - up - down
    return with_flips(measured, -up / kept, -down / kept)


def _flips(counts: Tensor, bit: int) -> Tensor:
    """Return float64[n_qubits], how often each qubit was read as the other bit, at most MAX_FLIP."""
    (histogram,) = frequencies(counts)
    n_qubits = len(histogram).bit_length() - 1
    others = [histogram.view(2**qubit, 2, -1)[:, 1 - bit].sum() for qubit in range(n_qubits)]
    return torch.stack(others).clamp(max=MAX_FLIP)


def prepared(runs: QuantumCircuit, circuit: Circuit, *, is_one: bool) -> QuantumCircuit:
    """Return a circuit that measures the same qubits into the same bits, after nothing or a NOT of each.

    Args:    runs: what the source runs, on the device's qubits or on those alone that it uses.
    """
    from qiskit import QuantumCircuit
    from qiskit.circuit.equivalence_library import SessionEquivalenceLibrary
    from qiskit.transpiler import PassManager
    from qiskit.transpiler.passes import BasisTranslator

    from qpa.circuits.targets import restrict

    measures = QuantumCircuit(runs.num_qubits, runs.num_clbits)
    for step in runs.data:
        if step.operation.name == "measure":
            qubit = runs.find_bit(step.qubits[0]).index
            if is_one:
                measures.x(qubit)
            measures.measure(qubit, runs.find_bit(step.clbits[0]).index)
    if circuit.device is None or circuit.native is None or not is_one:
        return measures
    target = circuit.device.target
    if runs.num_qubits != target.num_qubits:
        _, target = restrict(circuit.native, target)
    translate = BasisTranslator(SessionEquivalenceLibrary, target_basis=None, target=target)
    return PassManager([translate]).run(measures)
