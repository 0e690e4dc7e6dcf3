"""depolarizing: what depolarising noise takes away is given back.

The noise is taken for two channels. The one of all qubits together leaves w p + (1 - w) / 2**n_qubits of a
distribution p. The ones of single qubits, errors of the last gates and of the readout, flip each bit with a
probability of its own, the same for 0 and 1.

All of that is fitted to one further run of the circuit, with random angles of 0 or pi: they make it a
Clifford circuit that ends in one basis state, whichever the number of qubits. One such run is enough: a turn
by pi leaves a Pauli error what it was, so other angles of this kind would say the same. Only relaxation
depends on them, as it spares a qubit at 0; random ones have half of the qubits at 1. The inverse of the
channels is linear, and what it gives may be negative.

Source: arXiv 2103.08591 for a circuit that estimates the noise of another one of its shape, arXiv 2005.10189
for Clifford circuits as such; the channels are those of `qpa.circuits.gradients.surrogate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.surrogate import fit_channel
from qpa.circuits.mitigation.mitigation import Mitigation, apply_all, frequencies
from qpa.circuits.mitigation.readout import without_flips

if TYPE_CHECKING:
    from qpa.circuits.sources.sampled import SampledSource

REFERENCE = "depolarizing.reference"
LEAST_KEPT = 0.05
"""Below this there is no signal to give back."""


@final
class Depolarizing:
    """Rescale around the flat distribution, and invert flips."""

    name: ClassVar[str] = "depolarizing"
    is_of_gates: ClassVar[bool] = True

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Run the circuit with the angles of the reference."""
        return {REFERENCE: source.counts(circuit, reference_angles(circuit))}

    def calls(self, circuit: Circuit, n_circuits: int) -> tuple[int, ...]:
        """Return one call with one run, for any number of circuits."""
        return (1,)

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Undo the flips and divide the distance to the flat distribution by w, see `Mitigation.correct`."""
        seen = apply_all(before, frequencies(calibration[REFERENCE]), circuit, calibration)
        exact = _before_last_layer(circuit, circuit.exact_probabilities(reference_angles(circuit)))
        # With the same data for all bits the other way round, 0 and 1 are found to flip equally often.
        channel = fit_channel(torch.cat((exact, exact.flip(1))), torch.cat((seen, seen.flip(1))))
        flat = 1 / circuit.n_states
        unflipped = without_flips(measured, channel[1::2], channel[2::2])
        return flat + (unflipped - flat) / channel[0].clamp(min=LEAST_KEPT)


def reference_angles(circuit: Circuit) -> Tensor:
    """Return float64[1, n_angles], each 0 or pi, the same for every circuit of a shape."""
    random = torch.Generator().manual_seed(circuit.n_angles)
    return torch.randint(2, (1, circuit.n_angles), generator=random).double() * math.pi


def _before_last_layer(circuit: Circuit, probabilities: Tensor) -> Tensor:
    """Return the histogram of which `Circuit.histogram` makes the whole circuit's probabilities."""
    order = circuit.histogram(torch.arange(circuit.n_states)[None])[0]
    return probabilities[:, order.argsort()]
