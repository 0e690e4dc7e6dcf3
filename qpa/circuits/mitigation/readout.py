"""readout: every qubit's readout flips are inverted.

Two circuits are run besides: one measures qubits that were left at 0, the other qubits that were turned to 1. They
tell how often each qubit is read wrongly, and the inverse of that 2 x 2 matrix is applied to the qubit's axis of
the histogram. Errors that depend on two qubits are not seen.

Source: tensored readout error mitigation, arXiv 2006.14044.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.mitigation.mitigation import Mitigation, frequencies

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

    from qpa.circuits.sources.sampled import SampledSource

ZEROS, ONES = "readout.zeros", "readout.ones"


@final
class Readout:
    """The tensored inverse."""

    name: ClassVar[str] = "readout"
    is_of_circuits: ClassVar[bool] = False

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Measure all qubits at 0, and all at 1."""
        one = angles[:1]
        return {
            ZEROS: source.counts(circuit, one, lambda runs: prepared(runs, circuit, is_one=False)),
            ONES: source.counts(circuit, one, lambda runs: prepared(runs, circuit, is_one=True)),
        }

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return two, for any number of circuits."""
        return 2

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Invert the flips of each qubit, see `Mitigation.correct`."""
        zeros, ones = (_flips(calibration[name], bit) for name, bit in ((ZEROS, 0), (ONES, 1)))
        for qubit in range(len(zeros)):
            zero, one = measured.view(len(measured), 2**qubit, 2, -1).unbind(2)
            down, up = ones[qubit], zeros[qubit]
            kept = 1 - down - up
            axes = ((1 - down) * zero - down * one) / kept, ((1 - up) * one - up * zero) / kept
            measured = torch.stack(axes, 2).flatten(1)
        return measured


def _flips(counts: Tensor, bit: int) -> Tensor:
    """Return float64[n_qubits], how often each qubit was read as the other bit, at most 0.45."""
    histogram = frequencies(counts)[0]
    n_qubits = len(histogram).bit_length() - 1
    axes = histogram.view([2] * n_qubits)
    others = [axes.movedim(qubit, 0)[1 - bit].sum() for qubit in range(n_qubits)]
    return torch.stack(others).clamp(max=0.45)


def prepared(runs: QuantumCircuit, circuit: Circuit, *, is_one: bool) -> QuantumCircuit:
    """Return a circuit that measures the same qubits into the same bits, without gates or after a NOT on each."""
    from qiskit import QuantumCircuit
    from qiskit.transpiler import generate_preset_pass_manager

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
    layout = list(range(runs.num_qubits))
    return generate_preset_pass_manager(0, target=target, initial_layout=layout).run(measures)
