"""What Qiskit knows of a device, as a JSON file: with it a plan can be repeated after a new calibration.

    {"schema": "qpa.device/1", "name", "n_qubits", "dt_s", "calibrated",
     "qubits": [{"t1_s", "t2_s"}, ..],
     "operations": [{"name", "on": [{"qubits", "error", "duration_s"}, ..] or null}, ..]}

Only Qiskit's standard gates, measurement, reset and delay are kept. An operation that is on every set of
qubits, and of which no figures are known, has null for `on`. Null stands for an unknown figure.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from qpa.errors import DocumentError, one_sentence

if TYPE_CHECKING:
    from qiskit.transpiler import Target

SCHEMA = "qpa.device/1"


def dump_target(target: Target, name: str, calibrated: str | None = None) -> bytes:
    """Write a target as canonical JSON, the same bytes for the same target in every process.

    Args:    calibrated: when the device was calibrated, ISO 8601; None where it does not say.
    """
    content = {
        "schema": SCHEMA,
        "name": name,
        "n_qubits": target.num_qubits,
        "dt_s": target.dt,
        "calibrated": calibrated,
        "qubits": [
            {"t1_s": _finite(getattr(qubit, "t1", None)), "t2_s": _finite(getattr(qubit, "t2", None))}
            for qubit in target.qubit_properties or []
        ],
        "operations": [
            {"name": operation, "on": _places(target[operation])}
            for operation in sorted(target.operation_names)
            if operation in _gates()
        ],
    }
    return (json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n").encode()


def load_target(content: bytes, subject: str) -> tuple[str, str | None, Target]:
    """Read a target.

    Returns: the device's name, when it was calibrated, and the target.
    Raises:  DocumentError: it is no file of this schema.
    """
    from qiskit.circuit import Parameter
    from qiskit.transpiler import InstructionProperties, QubitProperties, Target

    try:
        read = json.loads(content)
        if read["schema"] != SCHEMA:
            raise ValueError(f"schema {read['schema']}")
        qubits = [QubitProperties(t1=qubit["t1_s"], t2=qubit["t2_s"]) for qubit in read["qubits"]]
        target = Target(num_qubits=read["n_qubits"], dt=read["dt_s"], qubit_properties=qubits or None)
        for operation in read["operations"]:
            gate = _gates()[operation["name"]]
            places = operation["on"]
            if gate.name == "delay":
                gate = type(gate)(Parameter("t"))
            properties = places and {
                tuple(place["qubits"]): InstructionProperties(place["duration_s"], place["error"])
                for place in places
            }
            target.add_instruction(gate, properties, name=operation["name"])
        return read["name"], read["calibrated"], target
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = f"a device's file of schema {SCHEMA}"
        raise DocumentError(subject, expected, one_sentence(error), "transpile again") from error


def _gates() -> dict[str, Any]:
    from qiskit.circuit.library import get_standard_gate_name_mapping

    mapping: dict[str, Any] = get_standard_gate_name_mapping()
    return mapping


def _places(places: Any) -> list[dict[str, Any]] | None:
    if None in places:
        return None
    return [
        {
            "qubits": list(qubits),
            "error": _finite(getattr(properties, "error", None)),
            "duration_s": _finite(getattr(properties, "duration", None)),
        }
        for qubits, properties in sorted(places.items())
    ]


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
