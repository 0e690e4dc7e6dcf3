"""Devices: what a name stands for, how likely a circuit runs there without an error, and for how long."""

from __future__ import annotations

import difflib
import math
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from qpa.circuits.circuit import NO_DEVICE
from qpa.circuits.operations import qubits_of
from qpa.errors import TargetError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import CircuitInstruction
    from qiskit.transpiler import Target

MAX_GENERIC_QUBITS = 1000

RESET_S = 250e-6
"""How long the qubits of a device rest between two runs, in seconds: the default of IBM's devices."""

_KNOWN = (
    "none, generic:<qubits>, ions:<qubits>, ibm_.., module:callable or a fake backend such as fake_torino"
)
_GENERIC_SEED = 0

_ION_GATES = {"rx": (3e-5, 1e-5), "ry": (3e-5, 1e-5), "rz": (0.0, 0.0), "rzz": (2e-3, 2e-4)}
_ION_READOUT = (2e-3, 3e-4)
"""Errors, and durations in seconds, of the size that trapped ions have; those of no device in particular."""


@final
@dataclass(frozen=True, slots=True)
class Device:
    """A device: what Qiskit knows of it, under the name by which it is found again.

    Args:    calibrated: when it was calibrated, ISO 8601; None where it does not say.
    """

    name: str
    target: Target
    calibrated: str | None = None


def find_device(target: str) -> Device | None:
    """Find what a target's name stands for.

    "none" is no device. "generic:<qubits>" is a line of qubits with Qiskit's generic gates and errors,
    the same device for every seed. "ions:<qubits>" joins every pair of qubits, as trapped ions do, with
    errors and durations of that size. Any other name is a fake backend of qiskit-ibm-runtime, a snapshot of
    a real device, in any case and with or without underscores: "fake_torino", "FakeTorino". "ibm_.." and
    "module:callable" are the targets of these backends as they are now, see `qpa.circuits.sources.backend`.

    Returns: the device under its canonical name, or None for "none".
    Raises:  TargetError: no such target, or the extra `ibm` is not installed.
             OptionError, SourceError: a backend of this name is not found.
    """
    wanted = target.strip().lower()
    if wanted == NO_DEVICE:
        return None
    kind, _, n_qubits = wanted.partition(":")
    if kind in ("generic", "ions"):
        size = _size(target, kind, n_qubits)
        return _generic_device(size) if kind == "generic" else _ion_device(size)
    if wanted.startswith("ibm_") or ":" in wanted:
        return _device_of_backend(target.strip())
    return _fake_device(target)


def list_devices() -> list[Device]:
    """Return one device of each kind that can be named: the kinds with a size, and all fake backends.

    Fake backends are left out where the extra `ibm` is not installed.
    """
    sized = [_generic_device(27), _ion_device(27)]
    try:
        names = sorted(fake_backends("targets"))
    except TargetError:
        names = []
    return [*sized, *(_fake_device(name) for name in names)]


def median_errors(target: Target) -> tuple[float | None, float | None]:
    """Return the median errors of gates on two qubits and of measurements; None where none is reported."""
    gates = [
        properties.error
        for name in target.operation_names
        if target.operation_from_name(name).num_qubits == 2
        for properties in target[name].values()
    ]
    readout = [properties.error for properties in target["measure"].values()]
    return _median(gates), _median(readout)


def _median(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None and math.isfinite(error)]
    return statistics.median(known) if known else None


def success_probability(circuit: QuantumCircuit, target: Target) -> float | None:
    """Estimate how likely a run meets no error: the product of (1 - error) over gates and measurements.

    Returns: within 0 and 1; None where the target reports no error for one of them.
    Source:  ours; the score by which Qiskit compares layouts, without idle errors.
    """
    errors = [_reported_error(step, circuit, target) for step in circuit.data]
    known = [error for error in errors if error is not None]
    return math.prod(1.0 - error for error in known) if len(known) == len(errors) else None


def duration_s(circuit: QuantumCircuit, target: Target) -> float | None:
    """Return how long one run takes, in seconds: every operation starts as soon as its qubits are free.

    Returns: without the time to reset the qubits; None where the target does not say how long an operation
             takes.
    """
    free_s = dict.fromkeys(range(circuit.num_qubits), 0.0)
    for step in circuit.data:
        qubits = qubits_of(step, circuit)
        if step.operation.name == "barrier":
            length_s = 0.0
        else:
            properties = target[step.operation.name].get(qubits)
            if properties is None or properties.duration is None:
                return None
            length_s = properties.duration
        end_s = max(free_s[qubit] for qubit in qubits) + length_s
        free_s.update(dict.fromkeys(qubits, end_s))
    return max(free_s.values())


def restrict(circuit: QuantumCircuit, target: Target) -> tuple[QuantumCircuit, Target]:
    """Return a native circuit and its target on the qubits alone that the circuit uses, in their order."""
    from qiskit import QuantumCircuit
    from qiskit.transpiler import QubitProperties, Target

    used = sorted({qubit for step in circuit.data for qubit in qubits_of(step, circuit)})
    place = {qubit: number for number, qubit in enumerate(used)}
    small = QuantumCircuit(len(used), circuit.num_clbits, name=circuit.name)
    for step in circuit.data:
        qubits = [place[qubit] for qubit in qubits_of(step, circuit)]
        small.append(step.operation, qubits, [circuit.find_bit(bit).index for bit in step.clbits])
    known = target.qubit_properties or [QubitProperties()] * target.num_qubits
    properties = [known[qubit] for qubit in used]
    narrow = Target(num_qubits=len(used), dt=target.dt, qubit_properties=properties)
    for name in target.operation_names:
        kept = {
            tuple(place[qubit] for qubit in qubits): facts
            for qubits, facts in target[name].items()
            if qubits is not None and all(qubit in place for qubit in qubits)
        }
        if kept:
            narrow.add_instruction(target.operation_from_name(name), kept, name=name)
    return small, narrow


def _reported_error(step: CircuitInstruction, circuit: QuantumCircuit, target: Target) -> float | None:
    properties = target[step.operation.name].get(qubits_of(step, circuit))
    error = None if properties is None else properties.error
    return error if error is not None and math.isfinite(error) else None


def _size(target: str, kind: str, n_qubits: str) -> int:
    in_range = n_qubits.isascii() and n_qubits.isdecimal() and len(n_qubits) <= len(str(MAX_GENERIC_QUBITS))
    if not in_range or not 1 <= int(n_qubits) <= MAX_GENERIC_QUBITS:
        raise TargetError(
            f"target {target}",
            f"{kind}:<qubits> with 1 to {MAX_GENERIC_QUBITS} qubits",
            repr(n_qubits),
            f"write, for example, {kind}:27",
        )
    return int(n_qubits)


def _generic_device(size: int) -> Device:
    from qiskit.providers.fake_provider import GenericBackendV2
    from qiskit.transpiler import CouplingMap

    gates = ["id", "rz", "sx", "x", "cx"][: 5 if size > 1 else 4]
    backend = GenericBackendV2(size, gates, coupling_map=CouplingMap.from_line(size), seed=_GENERIC_SEED)
    return Device(f"generic:{size}", backend.target)


def _ion_device(size: int) -> Device:
    from qiskit.circuit import Measure
    from qiskit.circuit.library import get_standard_gate_name_mapping
    from qiskit.transpiler import InstructionProperties, Target

    target, gates = Target(num_qubits=size), get_standard_gate_name_mapping()
    pairs = [(first, second) for first in range(size) for second in range(size) if first != second]
    for name, (error, duration_s) in _ION_GATES.items():
        places = [(qubit,) for qubit in range(size)] if gates[name].num_qubits == 1 else pairs
        if places:
            properties = {qubits: InstructionProperties(duration_s, error) for qubits in places}
            target.add_instruction(gates[name], properties)
    error, duration_s = _ION_READOUT
    readout = {(qubit,): InstructionProperties(duration_s, error) for qubit in range(size)}
    target.add_instruction(Measure(), readout)
    return Device(f"ions:{size}", target)


def fake_backends(subject: str) -> dict[str, type[Any]]:
    """Return the classes of the fake backends by their canonical names.

    Args:    subject: what asks for one, for the error.
    Raises:  TargetError: the extra `ibm` is not installed.
    """
    try:
        from qiskit_ibm_runtime import fake_provider
    except ModuleNotFoundError as error:
        found, advice = "no qiskit-ibm-runtime for fake backends", "pip install 'qpa[ibm]'"
        raise TargetError(subject, _KNOWN, found, advice) from error
    return {
        backend.backend_name: backend
        for backend in vars(fake_provider).values()
        if isinstance(backend, type) and hasattr(backend, "backend_name")
    }


def fake_backend(target: str) -> Any:
    """Return a fake backend by its name, see `find_device`.

    Raises:  TargetError: there is none of this name, or the extra `ibm` is not installed.
    """
    backends = fake_backends(f"target {target}")
    for name, backend in backends.items():
        if _spelling(name) == _spelling(target):
            return backend()
    nearest = difflib.get_close_matches(target.lower(), sorted(backends), n=3, cutoff=0.0)
    raise TargetError(f"target {target}", _KNOWN, "no such target", f"nearest: {', '.join(nearest)}")


def _device_of_backend(name: str) -> Device:
    from qiskit.transpiler import Target

    from qpa.circuits.sources.backend import find_backend

    backend = find_backend(name)
    target = getattr(backend, "target", None)
    if not isinstance(target, Target) or target.num_qubits is None:
        raise TargetError(f"target {name}", "a backend that has a target", type(backend).__name__)
    return Device(name, target, _calibrated(backend))


def _fake_device(target: str) -> Device:
    backend = fake_backend(target)
    return Device(backend.backend_name, backend.target, _calibrated(backend))


def _calibrated(backend: Any) -> str | None:
    """Return when a backend of IBM was calibrated, ISO 8601."""
    properties = backend.properties() if hasattr(backend, "properties") else None
    date = getattr(properties, "last_update_date", None)
    return None if date is None else date.isoformat()


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower().removesuffix("v2")
