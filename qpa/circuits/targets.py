"""Devices: what a name stands for, and how likely a circuit runs there without an error."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from qpa.circuits.circuit import NO_DEVICE
from qpa.errors import TargetError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import CircuitInstruction
    from qiskit.transpiler import Target

MAX_GENERIC_QUBITS = 1000

_KNOWN = "none, generic:<qubits> or a fake backend such as fake_torino"
_GENERIC_SEED = 0


@final
@dataclass(frozen=True, slots=True)
class Device:
    """A device: what Qiskit knows of it, under the name by which it is found again."""

    name: str
    target: Target


def find_device(target: str) -> Device | None:
    """Find what a target's name stands for.

    "none" is no device. "generic:<qubits>" is a line of qubits with Qiskit's generic gates and errors,
    the same device for every seed. Any other name is a fake backend of qiskit-ibm-runtime, a snapshot
    of a real device, in any case and with or without underscores: "fake_torino", "FakeTorino".

    Returns: the device under its canonical name, or None for "none".
    Raises:  TargetError: no such target, or the extra `ibm` is not installed.
    """
    wanted = target.strip().lower()
    if wanted == NO_DEVICE:
        return None
    kind, _, n_qubits = wanted.partition(":")
    return _generic_device(target, n_qubits) if kind == "generic" else _fake_device(target)


def success_probability(circuit: QuantumCircuit, target: Target) -> float | None:
    """Estimate how likely a run meets no error: the product of (1 - error) over gates and measurements.

    Returns: within 0 and 1; None where the target reports no error for one of them.
    Source:  ours; the score by which Qiskit compares layouts, without idle errors.
    """
    errors = [_reported_error(step, circuit, target) for step in circuit.data]
    known = [error for error in errors if error is not None]
    return math.prod(1.0 - error for error in known) if len(known) == len(errors) else None


def _reported_error(step: CircuitInstruction, circuit: QuantumCircuit, target: Target) -> float | None:
    qubits = tuple(circuit.find_bit(qubit).index for qubit in step.qubits)
    properties = target[step.operation.name].get(qubits)
    error = None if properties is None else properties.error
    return error if error is not None and math.isfinite(error) else None


def _generic_device(target: str, n_qubits: str) -> Device:
    from qiskit.providers.fake_provider import GenericBackendV2
    from qiskit.transpiler import CouplingMap

    in_range = n_qubits.isascii() and n_qubits.isdecimal() and len(n_qubits) <= len(str(MAX_GENERIC_QUBITS))
    if not in_range or not 1 <= int(n_qubits) <= MAX_GENERIC_QUBITS:
        raise TargetError(
            f"target {target}",
            f"generic:<qubits> with 1 to {MAX_GENERIC_QUBITS} qubits",
            repr(n_qubits),
            "write, for example, generic:27",
        )
    size = int(n_qubits)
    gates = ["id", "rz", "sx", "x", "cx"][: 5 if size > 1 else 4]
    backend = GenericBackendV2(size, gates, coupling_map=CouplingMap.from_line(size), seed=_GENERIC_SEED)
    return Device(f"generic:{size}", backend.target)


def _fake_device(target: str) -> Device:
    try:
        from qiskit_ibm_runtime import fake_provider
    except ModuleNotFoundError as error:
        raise TargetError(
            f"target {target}", _KNOWN, "no qiskit-ibm-runtime for fake backends", "pip install 'qpa[ibm]'"
        ) from error
    backends = {
        backend.backend_name: backend
        for backend in vars(fake_provider).values()
        if isinstance(backend, type) and hasattr(backend, "backend_name")
    }
    for name, backend in backends.items():
        if _spelling(name) == _spelling(target):
            return Device(name, backend().target)
    nearest = difflib.get_close_matches(target.lower(), sorted(backends), n=3, cutoff=0.0)
    raise TargetError(f"target {target}", _KNOWN, "no such target", f"nearest: {', '.join(nearest)}")


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower().removesuffix("v2")
