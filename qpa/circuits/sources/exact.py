"""exact: noiseless simulation in torch, differentiable by autograd."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.source import Cost, check_angles


@final
class ExactSimulator:
    """The noiseless source.

    It simulates by the form that the ansatz has for it, else gate by gate
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
        """Return one execution a circuit."""
        return Cost(n_evaluations, n_evaluations, 1)
