"""transpile-circuit: from logical gates to a device's own gates on its own qubits."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from qpa.circuits.ry_cnot_chain import dump_qpy, to_qiskit
from qpa.documents import Document, GateCount, LogicalCircuit, NativeCircuit
from qpa.errors import TargetError
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import CircuitInstruction
    from qiskit.transpiler import Target

QPY_FILE = "native-circuit.qpy"
NO_DEVICE = "none"
MAX_GENERIC_QUBITS = 1000

_KNOWN = "none, generic:<qubits> or a fake backend such as fake_torino"
_GENERIC_SEED = 0
_NOT_GATES = ("measure", "barrier")


@final
@dataclass(frozen=True, slots=True)
class TranspileCircuit:
    """Lower the logical circuit to a target.

    1. The parametric circuit is transpiled once, with its measurements; angles are bound afterwards.
    2. Qiskit's preset pass manager of level 3 chooses qubits and gates by the target's errors; level 1
       can land on dead edges.
    3. For "none" the logical gates are the native ones.

    Args:    target: "none", "generic:<qubits>", or a fake backend's name, see `find_device`.
    Source:  Qiskit's preset pass managers.
    """

    target: str = NO_DEVICE

    name: ClassVar[str] = "transpile-circuit"
    consumes: ClassVar[type] = LogicalCircuit
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = NativeCircuit

    def run(self, source: LogicalCircuit, context: PassContext) -> NativeCircuit:
        """Return the native circuit's document; leave `native-circuit.qpy` in the context's files.

        Raises:  TargetError: the target is unknown, too small, or cannot carry the circuit.
        """
        native = to_qiskit(source)
        device = find_device(self.target)
        if device is not None:
            native = _transpile(native, device, context.seed_for(self.name))
        gates = [step for step in native.data if step.operation.name not in _NOT_GATES]
        return NativeCircuit(
            provenance=context.provenance(self, source),
            target=device.name if device else NO_DEVICE,
            n_target_qubits=device.target.num_qubits if device else source.n_qubits,
            physical_qubits=tuple(native.layout.initial_index_layout(filter_ancillas=True)) if device else (),
            gates=_count(gates),
            depth=native.depth(),
            n_two_qubit_gates=sum(len(gate.qubits) == 2 for gate in gates),
            estimated_success_probability=success_probability(native, device.target) if device else None,
            qpy=context.files.put(QPY_FILE, dump_qpy(native)),
        )


@final
@dataclass(frozen=True, slots=True)
class Device:
    """A target's facts under the name that finds them again."""

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


def _count(gates: list[CircuitInstruction]) -> tuple[GateCount, ...]:
    counts = Counter(gate.operation.name for gate in gates)
    return tuple(GateCount(gate=gate, count=count) for gate, count in sorted(counts.items()))


def _transpile(logical: QuantumCircuit, device: Device, seed: int) -> QuantumCircuit:
    from qiskit.exceptions import QiskitError
    from qiskit.transpiler import generate_preset_pass_manager

    subject = f"target {device.name}"
    n_qubits, n_target_qubits = logical.num_qubits, device.target.num_qubits
    if n_target_qubits < n_qubits:
        raise TargetError(
            subject, f"at least {n_qubits} qubits", str(n_target_qubits), "choose a larger device"
        )
    passes = generate_preset_pass_manager(3, target=device.target, seed_transpiler=seed)
    try:
        return passes.run(logical)
    except QiskitError as error:
        raise TargetError(
            subject, "a device that can carry the circuit", f"Qiskit's {error}", "choose another device"
        ) from error


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
