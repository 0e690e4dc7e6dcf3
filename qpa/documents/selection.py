"""Selection: which ways to run the circuit were tried on a device's noise, and which one was chosen."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, Record


class TriedCircuit(Record):
    """The circuit as one setting of the transpiler makes it.

    Args:    optimization_level, layouts: the options of transpile-circuit.
             transpiler_seed, depth, n_two_qubit_gates, estimated_success_probability, duration_s: see
             `NativeCircuit`.
             n_used_qubits: the qubits of the device that have a gate or a measurement.
             sha256: of the circuit in Qiskit's QPY format; equal ones are one circuit, which is tried once.
    """

    optimization_level: int
    layouts: int
    transpiler_seed: int | None
    depth: int
    n_two_qubit_gates: int
    estimated_success_probability: float | None
    duration_s: float | None
    n_used_qubits: int
    sha256: str


class Strategy(Record):
    """One candidate: a circuit, how often it is run, and how its counts are corrected.

    Args:    circuit: the place of its circuit in `Selection.circuits`, the first of equal ones.
             mitigation: names joined by "+", or "none", see `Measurement`.
             shots: of every circuit.
             error: mean total variation distance of the corrected counts to the exact probabilities, within
             0 and 1.
             n_executions: of the forward pass of one training step, with what the mitigation measures
             besides; every shot counts as one.
             time_s: how long these take on the device, in seconds, with the time to reset its qubits.
             is_non_dominated: whether no candidate is at least as good in the last three numbers and better
             in one, and none before it is equal in all of them.
    """

    circuit: int
    mitigation: str
    shots: int
    error: float
    n_executions: int
    time_s: float
    is_non_dominated: bool


class Selection(Document):
    """The result of select-strategy; no later pass reads it, so it is no stage of a run.

    Where the run was transpiled otherwise since, `chosen_circuit.sha256` is not that of the native circuit.

    Args:    target, calibrated, device: the device, see `NativeCircuit`; the file is a copy.
             n_circuits: circuits of a training step.
             n_reference_circuits: circuits with random angles, over which an error is the mean.
             angle_seed, sampling_seed, thinning_seed: draw the angles, the counts with the largest number of
             shots, and from these the counts with fewer shots.
             tolerance: how much larger than the smallest error that of the chosen one may be, as a fraction.
             circuits: one for each setting of the transpiler.
             candidates: the chosen one is at the place `chosen`.
             why: in words, why it is chosen.
    """

    kind: ClassVar[str] = "selection"

    target: str
    calibrated: str | None
    device: Attachment
    n_circuits: int
    n_reference_circuits: int
    angle_seed: int
    sampling_seed: int
    thinning_seed: int
    tolerance: float
    circuits: tuple[TriedCircuit, ...]
    candidates: tuple[Strategy, ...]
    chosen: int
    why: str

    @property
    def chosen_strategy(self) -> Strategy:
        """Return the chosen candidate."""
        return self.candidates[self.chosen]

    @property
    def chosen_circuit(self) -> TriedCircuit:
        """Return the circuit of the chosen candidate."""
        return self.circuits[self.chosen_strategy.circuit]

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if any(not 0 <= strategy.circuit < len(self.circuits) for strategy in self.candidates):
            raise ValueError("a candidate must have one of the circuits")
        if any(not 0.0 <= strategy.error <= 1.0 for strategy in self.candidates):
            raise ValueError("an error must be within 0 and 1")
        if any(strategy.shots < 1 or strategy.n_executions < strategy.shots for strategy in self.candidates):
            raise ValueError("a candidate has at least 1 shot, and no fewer executions than shots")
        if not 0 <= self.chosen < len(self.candidates) or not self.chosen_strategy.is_non_dominated:
            raise ValueError("the chosen one must be a candidate that none dominates")
        return self
