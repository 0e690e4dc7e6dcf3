"""exact: noiseless simulation in torch, differentiable by autograd."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.source import Cost, check_angles


@final
class ExactSimulator:
    """The noiseless source.

    It simulates in the way that the ansatz provides, which is gate by gate where it has no faster one
    (`qpa.circuits.sources.statevector`).
    """

    name: ClassVar[str] = "exact"
    is_differentiable: ClassVar[bool] = True
    runs_native: ClassVar[bool] = False
    shots: int | None = None

    def __init__(self, seed: int = 0) -> None:
        """Take a seed, as every source does; nothing here is random."""

    def probabilities(self, circuit: Circuit, angles: Tensor) -> Tensor:
        """Simulate a circuit, see `Source.probabilities`."""
        check_angles(circuit, angles)
        return circuit.exact_probabilities(angles)

    def cost(self, circuit: Circuit, n_evaluations: int) -> Cost:
        """Return one execution for each set of angles, all in one job."""
        return Cost(n_evaluations, n_evaluations, 1)
