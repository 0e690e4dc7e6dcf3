"""NativeCircuit: the circuit in a target's own gates, on its own qubits."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, JsonObject, Record, with_parents


class GateCount(Record):
    """How often a gate occurs in the native circuit."""

    gate: str
    count: int


class NativeCircuit(Document):
    """A LogicalCircuit lowered to a target.

    Args:    target: "none" (no device: the logical gates as they are), "generic:<qubits>", or a fake
             backend's name.
             n_target_qubits: qubits of the device; the circuit's own number for "none".
             physical_qubits: physical_qubits[k] is where logical qubit k starts; () for "none".
             gates: sorted by gate name, measurements and barriers left out.
             depth: longest path through those gates and the measurements.
             n_two_qubit_gates: gates on two qubits.
             estimated_success_probability: product of (1 - error) over all gates and measurements, by
             the target's reported errors; None where the target reports none.
             qpy: the parametric native circuit in Qiskit's QPY format.
    """

    kind: ClassVar[str] = "native-circuit"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (with_parents,)

    target: str
    n_target_qubits: int
    physical_qubits: tuple[int, ...]
    gates: tuple[GateCount, ...]
    depth: int
    n_two_qubit_gates: int
    estimated_success_probability: float | None
    qpy: Attachment

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if len(set(self.physical_qubits)) != len(self.physical_qubits):
            raise ValueError("physical qubits must be distinct")
        if any(not 0 <= qubit < self.n_target_qubits for qubit in self.physical_qubits):
            raise ValueError(f"physical qubits must be within the target's {self.n_target_qubits}")
        if self.n_two_qubit_gates > sum(gate.count for gate in self.gates):
            raise ValueError("there are more two-qubit gates than gates")
        probability = self.estimated_success_probability
        if probability is not None and not 0.0 <= probability <= 1.0:
            raise ValueError("estimated_success_probability must be within 0 and 1")
        return self
