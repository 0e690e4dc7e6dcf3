"""shots: the logical circuit without noise, sampled by Aer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.aer import aer_sampler
from qpa.circuits.sources.sampled import SampledSource

if TYPE_CHECKING:
    from qiskit import QuantumCircuit


@final
class ShotSimulator(SampledSource):
    """A device without errors, of which only counts are seen."""

    name: ClassVar[str] = "shots"
    runs_native: ClassVar[bool] = False

    def sampler(self, circuit: Circuit, seed: int) -> tuple[Any, QuantumCircuit]:
        """Return Aer's sampler and the logical circuit."""
        return aer_sampler(seed, method="statevector"), circuit.measured()
