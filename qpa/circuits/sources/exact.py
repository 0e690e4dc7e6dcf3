"""exact: noiseless simulation in torch, differentiable by autograd."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.source import Cost, SourceSettings, check_angles
from qpa.errors import OptionError


@final
class ExactSimulator:
    """The noiseless source.

    It simulates in the way that the ansatz provides, which is gate by gate where it has no faster one
    (`qpa.circuits.sources.statevector`).
    """

    name: ClassVar[str] = "exact"
    is_differentiable: ClassVar[bool] = True
    runs_native: ClassVar[bool] = False
    needs_backend: ClassVar[bool] = False
    is_paid: bool = False
    shots: int | None = None

    def __init__(self, settings: SourceSettings | None = None) -> None:
        """Take settings, as every source does; nothing here is random.

        Raises:  OptionError: there are shots.
        """
        if settings is not None and settings.shots is not None:
            advice = "choose another `source`, or leave it out"
            raise OptionError("shots", "none for the exact source", f"{settings.shots:,}", advice)

    def probabilities(self, circuit: Circuit, angles: Tensor) -> Tensor:
        """Simulate a circuit, see `Source.probabilities`."""
        check_angles(circuit, angles)
        return circuit.exact_probabilities(angles)

    def cost(self, circuit: Circuit, n_evaluations: int) -> Cost:
        """Return one execution for each set of angles, all in one job."""
        return Cost(n_evaluations, n_evaluations, 1)
