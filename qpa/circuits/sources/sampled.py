"""What sources with shots share: one parametric circuit and all its angles travel as one unit to a sampler.

Rules:
1. The circuit is transpiled once, with free parameters, and a call's sets of angles are one array beside it.
2. A call is one job, unless it has more executions than a job may have.
3. What a simulator draws is a function of the seed and of the call's angles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.source import (
    DEFAULT_SHOTS,
    MAX_EXECUTIONS,
    Cost,
    SourceSettings,
    check_angles,
    jobs_for,
    seed_of_angles,
)
from qpa.errors import OptionError, SourceError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

_SEEDS = 2**31

Change = Callable[["QuantumCircuit"], "QuantumCircuit"]
"""From the circuit that a source runs to another one on the same qubits and classical bits."""


class SampledSource(ABC):
    """A source that counts measured basis states.

    Class attributes: see `Source`.
    """

    name: ClassVar[str]
    is_differentiable: ClassVar[bool] = False
    runs_native: ClassVar[bool]
    needs_backend: ClassVar[bool] = False
    is_paid: bool = False

    def __init__(self, settings: SourceSettings) -> None:
        """Take the settings.

        Raises:  OptionError: there is one that this source cannot use.
        """
        self.settings = settings
        self.shots = DEFAULT_SHOTS if settings.shots is None else settings.shots
        if not 1 <= self.shots <= MAX_EXECUTIONS:
            raise OptionError("shots", f"a number from 1 to {MAX_EXECUTIONS:,}", f"{self.shots:,}")

    @abstractmethod
    def sampler(self, circuit: Circuit, seed: int) -> tuple[Any, QuantumCircuit]:
        """Return a `BaseSamplerV2`, and the circuit that it runs: native, or on its own qubits alone.

        Args:    seed: from which a simulator draws; below 2**31.
        """

    def counts(self, circuit: Circuit, angles: Tensor, change: Change | None = None) -> Tensor:
        """Run the circuits and count what was measured.

        Args:    angles: float[n_evaluations, n_angles], radians.
                 change: makes of the circuit that is run another one on the same qubits, such as one that
                 only measures.
        Returns: int64[n_evaluations, 2**n_qubits], as it was measured: where the native circuit lacks the
                 last entangling layer, `Circuit.histogram` is still to be applied.
        Raises:  ShapeError: the angles are not the circuit's.
                 SourceError: counts are missing, or what runs the circuits fails.
        """
        check_angles(circuit, angles)
        rows = angles.detach().cpu().double().numpy()
        uses = [change.__qualname__] if change else []  # another circuit draws by itself
        n_rows, parts = self._rows_of_a_job(), []
        for start in range(0, len(rows), n_rows):
            job = [*uses, str(start)] if start else uses
            sampler, runs = self.sampler(circuit, seed_of_angles(self.settings.seed, angles, *job) % _SEEDS)
            runs = change(runs) if change else runs
            parts.append(self._run(sampler, circuit, runs, rows[start : start + n_rows]))
        return torch.from_numpy(np.concatenate(parts))

    def probabilities(self, circuit: Circuit, angles: Tensor) -> Tensor:
        """Run the circuits, see `Source.probabilities`."""
        return circuit.histogram(self.counts(circuit, angles) / self.shots).to(angles)

    def cost(self, circuit: Circuit, n_evaluations: int) -> Cost:
        """Return every shot as an execution, in as few jobs as may carry them."""
        return Cost(n_evaluations, n_evaluations * self.shots, jobs_for(n_evaluations, self.shots))

    def result(self, sampler: Any, units: list[Any]) -> Any:
        """Submit a job and wait for its result."""
        return sampler.run(units, shots=self.shots).result()

    def _rows_of_a_job(self) -> int:
        return max(1, MAX_EXECUTIONS // self.shots)

    def _run(self, sampler: Any, circuit: Circuit, runs: QuantumCircuit, rows: Any) -> Any:
        """Return the counts int64[n_rows, 2**n_qubits] of one job."""
        free = sorted(runs.parameters, key=lambda parameter: parameter.index)
        values = {tuple(free): rows[:, [parameter.index for parameter in free]]}
        (register,) = self.result(sampler, [(runs, values if free else None)])[0].data.values()
        packed = register.array.astype(np.int64).reshape(len(rows), -1, register.array.shape[-1])
        if packed.shape[1] != self.shots:
            found = f"{packed.shape[1]:,}"
            raise SourceError(f"source {self.name}", f"{self.shots:,} shots of every circuit", found)
        places = 256 ** np.arange(packed.shape[2])[::-1]
        return np.stack([np.bincount(row, minlength=circuit.n_states) for row in packed @ places])
