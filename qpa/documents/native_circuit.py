"""NativeCircuit: the circuit in a target's own gates, on its own qubits."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, JsonObject, Record, with_parents


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 kept the device's name alone, and always ended with the last entangling layer."""
    return content | {
        "calibrated": None,
        "device": None,
        "lacks_last_layer": False,
        "transpiler_seed": None,
        "duration_s": None,
    }


class GateCount(Record):
    """How often a gate occurs in the native circuit."""

    gate: str
    count: int


class NativeCircuit(Document):
    """A LogicalCircuit lowered to a target.

    Args:    target: "none" (no device: the logical gates as they are), "generic:<qubits>", "ions:<qubits>" or
             a fake backend's name.
             calibrated: when the device was calibrated, ISO 8601; None where it does not say.
             device: what was known of the device, see `qpa.circuits.target_files`; None for "none", and in
             documents of an older schema.
             lacks_last_layer: whether the circuit ends before its last entangling layer, which is no more
             than a permutation of the measured histogram and is applied to it instead: the result is exact.
             transpiler_seed: the seed, of those that were tried, whose circuit this is; None for "none".
             duration_s: how long one run takes on the device, in seconds, without the time to reset its
             qubits; None where the device does not say.
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
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (with_parents, _upgrade_2)

    target: str
    calibrated: str | None
    device: Attachment | None
    lacks_last_layer: bool
    transpiler_seed: int | None
    duration_s: float | None
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
