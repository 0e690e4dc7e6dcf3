"""What a mitigation is: it measures something besides, and corrects a histogram by it.

Several are applied one after another, as "readout+zne" says: first what undoes errors of the readout, which
come last in a run, then what undoes those of gates. All of them give numbers that may be negative; at the end
these become the nearest distribution.

Which one is best is measured by `benchmarks.mitigation`, where every way gets the same number of shots in
all. RECOMMENDED is the best of most of its rows, and every other one that is listed has a part in the best of
some row. Two are not listed, as they are the best of none: mthree (arXiv 2108.12518) gives what readout does,
and Q-Cluster (arXiv 2504.10801) moves shots to a few centres, which histograms of a generator do not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from qpa.circuits.circuit import Circuit
from qpa.errors import OptionError
from qpa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from qpa.circuits.sources.sampled import SampledSource

NONE = "none"
RECOMMENDED = "depolarizing"


class Mitigation(Protocol):
    """A way to correct histograms; it has no state.

    Class attributes: `name` is how a user asks for it; `is_of_gates` says whether it undoes the errors of
    gates. Two that do so would undo them twice, so only the last of several may.
    Source:  ours.
    """

    name: ClassVar[str]
    is_of_gates: ClassVar[bool]

    def calibrate(self, source: SampledSource, circuit: Circuit, angles: Tensor) -> Mapping[str, Tensor]:
        """Run what the correction needs to know besides the counts.

        Args:    angles: float[n_circuits, n_angles], radians, of the circuits that are to be corrected.
        Returns: counts int64[n, 2**n_qubits] by name, as they were measured.
        Raises:  SourceError: what runs the circuits fails.
        """
        ...

    def calls(self, circuit: Circuit, n_circuits: int) -> tuple[int, ...]:
        """Return how many sets of angles each call runs that `calibrate` makes of the source."""
        ...

    def correct(
        self,
        measured: Tensor,
        circuit: Circuit,
        calibration: Mapping[str, Tensor],
        before: Sequence[Mitigation],
    ) -> Tensor:
        """Return corrected histograms.

        Args:    measured: float64[n_circuits, 2**n_qubits], before `Circuit.histogram` is applied; rows sum
                 to 1 and may have negative numbers.
                 calibration: what `calibrate` of this one and of those before it gave.
                 before: the mitigations that were applied to `measured`, and must be to a calibration of the
                 same errors.
        Returns: likewise.
        """
        ...


MITIGATIONS: Registry[type[Mitigation]] = Registry(
    "mitigation",
    {
        "readout": "qpa.circuits.mitigation.readout:Readout",
        "depolarizing": "qpa.circuits.mitigation.depolarizing:Depolarizing",
        "zne": "qpa.circuits.mitigation.zero_noise:ZeroNoise",
    },
)


def parse_mitigations(text: str) -> list[Mitigation]:
    """Return the mitigations that "readout+zne" names; none for "none".

    Raises:  OptionError: one is unknown or named twice, or one that undoes errors of gates is not the last.
    """
    if text == NONE:
        return []
    names = text.split("+")
    if len(set(names)) < len(names):
        raise OptionError("mitigation", "every name once", text)
    found = [MITIGATIONS[name]() for name in names]
    for mitigation in found[:-1]:
        if mitigation.is_of_gates:
            raise OptionError("mitigation", f"{mitigation.name} as the last", text)
    return found


def calibrate(
    mitigations: Sequence[Mitigation], source: SampledSource, circuit: Circuit, angles: Tensor
) -> dict[str, Tensor]:
    """Return what all of them need to know besides the counts, see `Mitigation.calibrate`."""
    found: dict[str, Tensor] = {}
    for mitigation in mitigations:
        found |= mitigation.calibrate(source, circuit, angles)
    return found


def corrected(
    mitigations: Sequence[Mitigation], counts: Tensor, circuit: Circuit, calibration: Mapping[str, Tensor]
) -> Tensor:
    """Return the distributions that counts stand for.

    Args:    counts: int64[n_circuits, 2**n_qubits], as they were measured.
    Returns: float32[n_circuits, 2**n_qubits] of the whole circuits; rows sum to 1, no number is negative.
    """
    import torch

    measured = apply_all(mitigations, frequencies(counts), circuit, calibration)
    if mitigations:
        measured = nearest_distribution(measured)
    return circuit.histogram(measured).to(torch.float32)


def apply_all(
    mitigations: Sequence[Mitigation], measured: Tensor, circuit: Circuit, calibration: Mapping[str, Tensor]
) -> Tensor:
    """Return histograms after all mitigations in turn, see `Mitigation.correct`."""
    for number, mitigation in enumerate(mitigations):
        measured = mitigation.correct(measured, circuit, calibration, mitigations[:number])
    return measured


def frequencies(counts: Tensor) -> Tensor:
    """Return float64 histograms whose rows sum to 1."""
    numbers = counts.double()
    return numbers / numbers.sum(1, keepdim=True)


def nearest_distribution(measured: Tensor) -> Tensor:
    """Return for each row the distribution with the least squared distance to it.

    Args:    measured: float64[n, 2**n_qubits].
    Source:  Smolin, Gambetta, Smith, Phys. Rev. Lett. 108 (2012), 070502.
    """
    import torch

    ordered = measured.sort(1, descending=True).values
    n_kept = torch.arange(1, measured.shape[1] + 1, dtype=measured.dtype)
    excess = (ordered.cumsum(1) - 1) / n_kept
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (measured - excess.gather(1, last)).clamp(min=0)
