"""transpile-circuit: from logical gates to a device's own gates on its own qubits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from qpa.circuits.circuit import NO_DEVICE
from qpa.circuits.qiskit_files import dump_qpy, to_qiskit
from qpa.circuits.targets import find_device, success_probability
from qpa.documents import Document, GateCount, LogicalCircuit, NativeCircuit
from qpa.errors import TargetError
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import CircuitInstruction

    from qpa.circuits.targets import Device

QPY_FILE = "native-circuit.qpy"
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

    name: ClassVar[str] = "transpile-circuit"
    consumes: ClassVar[type] = LogicalCircuit
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = NativeCircuit
    section: ClassVar[str] = "plan"

    target: str = option(
        NO_DEVICE,
        name="device_target",
        help="Device to transpile to: none, generic:<qubits>, or a fake backend such as fake_torino.",
        old_names=("target",),
    )

    def run(self, source: LogicalCircuit, context: PassContext) -> NativeCircuit:
        """Return the native circuit's document; leave `native-circuit.qpy` in the context's files.

        Raises:  TargetError: the target is unknown, too small, or cannot carry the circuit.
        """
        native = to_qiskit(source.ansatz)
        device = find_device(self.target)
        if device is not None:
            native = _transpile(native, device, context.seed_for(self.name))
        gates = [step for step in native.data if step.operation.name not in _NOT_GATES]
        return NativeCircuit(
            provenance=context.provenance(self, source),
            target=device.name if device else NO_DEVICE,
            n_target_qubits=device.target.num_qubits if device else source.ansatz.n_qubits,
            physical_qubits=tuple(native.layout.initial_index_layout(filter_ancillas=True)) if device else (),
            gates=_count(gates),
            depth=native.depth(),
            n_two_qubit_gates=sum(len(gate.qubits) == 2 for gate in gates),
            estimated_success_probability=success_probability(native, device.target) if device else None,
            qpy=context.files.put(QPY_FILE, dump_qpy(native)),
        )


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
