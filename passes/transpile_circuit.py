"""transpile-circuit: from logical gates to a device's own gates on its own qubits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from qpa.circuits.ansatz import kind_of
from qpa.circuits.circuit import NO_DEVICE
from qpa.circuits.circuit_options import PANEL, refuse_without_circuits
from qpa.circuits.qiskit_files import dump_qpy, to_qiskit
from qpa.circuits.target_files import dump_target, load_target
from qpa.circuits.targets import duration_s, find_device, success_probability
from qpa.documents import Ansatz, Document, GateCount, LogicalCircuit, NativeCircuit, WeightLayout
from qpa.errors import TargetError
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import CircuitInstruction
    from qiskit.transpiler import Target

QPY_FILE = "native-circuit.qpy"
DEVICE_FILE = "native-circuit.device"
_NOT_GATES = ("measure", "barrier")


@final
@dataclass(frozen=True, slots=True)
class TranspileCircuit:
    """Lower the logical circuit to a target.

    1. The parametric circuit is transpiled once, with its measurements; angles are bound afterwards.
    2. Qiskit's preset pass managers choose qubits and gates by the target's errors; level 1 can land on dead
       edges.
    3. What is known of the device is kept as a file, and the circuit is transpiled for what that file says,
       so that the plan can be repeated when the device has been calibrated again.
    4. Of several seeds, which lead to other layouts, the one with the highest estimated success probability
       is kept.
    5. Where the last entangling layer is no more than a permutation of the measured histogram, it is left
       out, and the histogram is permuted: fewer gates, and exactly the same result.
    6. For "none" the logical gates are the native ones; no other target is taken where no circuit of the plan
       is measured.

    Args:    target: "none", "generic:<qubits>", "ions:<qubits>" or a fake backend's name, see `find_device`.
             optimization_level: of Qiskit's preset pass managers.
             layouts: how many seeds are tried.
             keep_last_layer: run the last entangling layer on the device.
    Source:  Qiskit's preset pass managers.
    """

    panel: ClassVar[str] = PANEL
    name: ClassVar[str] = "transpile-circuit"
    consumes: ClassVar[type] = LogicalCircuit
    requires: ClassVar[tuple[type[Document], ...]] = (WeightLayout,)
    produces: ClassVar[type[Document]] = NativeCircuit
    section: ClassVar[str] = "plan"

    target: str = option(
        NO_DEVICE,
        name="device_target",
        help="Device to transpile to: none, generic:<qubits>, ions:<qubits>, or a fake backend such as "
        "fake_torino; `qpa targets` lists them.",
        old_names=("target",),
    )
    optimization_level: int = option(3, help="Level of Qiskit's transpiler.", at_least=0, at_most=3)
    layouts: int = option(
        1, help="Seeds of the transpiler to try; the likeliest to succeed is kept.", at_least=1
    )
    keep_last_layer: bool = option(
        False, help="Run the last entangling layer on the device, which could be a permutation of counts."
    )

    def run(self, source: LogicalCircuit, context: PassContext) -> NativeCircuit:
        """Return the native circuit's document; leave `native-circuit.qpy` in the context's files.

        Raises:  OptionError: an option is out of range, or given where no circuit of the plan is measured.
                 TargetError: the target is unknown, too small, or cannot carry the circuit.
        """
        check_options(self)
        refuse_without_circuits(self, context.document(WeightLayout))
        ansatz, device = source.ansatz, find_device(self.target)
        lacks_last_layer = device is not None and not self.keep_last_layer and _is_permutation(ansatz)
        logical = to_qiskit(ansatz, has_last_layer=not lacks_last_layer)
        if device is None:
            native, seed, target, kept = logical, None, None, None
        else:
            kept = dump_target(device.target, device.name, device.calibrated)
            *_, target = load_target(kept, device.name)
            native, seed = self._transpile(logical, device.name, target, context)
        gates = [step for step in native.data if step.operation.name not in _NOT_GATES]
        return NativeCircuit(
            provenance=context.provenance(self, source),
            target=device.name if device else NO_DEVICE,
            calibrated=device.calibrated if device else None,
            device=context.files.put(DEVICE_FILE, kept) if kept else None,
            lacks_last_layer=lacks_last_layer,
            transpiler_seed=seed,
            duration_s=duration_s(native, target) if target else None,
            n_target_qubits=target.num_qubits if target else ansatz.n_qubits,
            physical_qubits=tuple(native.layout.initial_index_layout(filter_ancillas=True)) if target else (),
            gates=_count(gates),
            depth=native.depth(),
            n_two_qubit_gates=sum(len(gate.qubits) == 2 for gate in gates),
            estimated_success_probability=success_probability(native, target) if target else None,
            qpy=context.files.put(QPY_FILE, dump_qpy(native)),
        )

    def _transpile(
        self, logical: QuantumCircuit, name: str, target: Target, context: PassContext
    ) -> tuple[QuantumCircuit, int]:
        """Return the native circuit that is likeliest to succeed, and its seed; the first of equals."""
        seeds = [
            context.seed_for(self.name if number == 0 else f"{self.name} {number}")
            for number in range(self.layouts)
        ]
        natives = [_transpile(logical, name, target, seed, self.optimization_level) for seed in seeds]
        scores = [success_probability(native, target) or 0.0 for native in natives]
        best = scores.index(max(scores))
        return natives[best], seeds[best]


def _is_permutation(ansatz: Ansatz) -> bool:
    return kind_of(ansatz).last_layer_permutation(ansatz) is not None


def _count(gates: list[CircuitInstruction]) -> tuple[GateCount, ...]:
    counts = Counter(gate.operation.name for gate in gates)
    return tuple(GateCount(gate=gate, count=count) for gate, count in sorted(counts.items()))


def _transpile(
    logical: QuantumCircuit, name: str, target: Target, seed: int, optimization_level: int
) -> QuantumCircuit:
    from qiskit.exceptions import QiskitError
    from qiskit.transpiler import generate_preset_pass_manager

    subject = f"target {name}"
    n_qubits, n_target_qubits = logical.num_qubits, target.num_qubits
    if n_target_qubits < n_qubits:
        raise TargetError(
            subject, f"at least {n_qubits} qubits", str(n_target_qubits), "choose a larger device"
        )
    passes = generate_preset_pass_manager(optimization_level, target=target, seed_transpiler=seed)
    try:
        return passes.run(logical)
    except QiskitError as error:
        raise TargetError(
            subject, "a device that can carry the circuit", f"Qiskit's {error}", "choose another device"
        ) from error
