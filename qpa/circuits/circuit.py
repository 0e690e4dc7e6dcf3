"""The circuit as an object that a source runs, made from the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpa.circuits.ansatz import kind_of
from qpa.documents import Ansatz, Attachment, LogicalCircuit, NativeCircuit
from qpa.errors import DocumentError
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from torch import Tensor

    from qpa.circuits.targets import Device

NO_DEVICE = "none"


@dataclass(frozen=True)
class Circuit:
    """One parametric circuit.

    Args:    ansatz: which circuit it is.
             native: the same circuit in a device's own gates, with its measurements, as transpile-circuit
             left it; None where it was not loaded.
             device: what was known of the device when the circuit was transpiled; None for no device.
             lacks_last_layer: whether the native circuit ends before the last entangling layer, so that its
             histogram is permuted instead.
    Raises:  DocumentError: this qpa has no such ansatz.
    """

    ansatz: Ansatz
    native: QuantumCircuit | None = None
    device: Device | None = None
    lacks_last_layer: bool = False

    def __post_init__(self) -> None:
        kind_of(self.ansatz)

    @classmethod
    def of(cls, logical: LogicalCircuit) -> Circuit:
        """Return the circuit of a document."""
        return cls(logical.ansatz)

    @property
    def n_angles(self) -> int:
        """Return the number of its angles."""
        return self.ansatz.n_angles

    @property
    def n_states(self) -> int:
        """Return the number of its basis states."""
        return 1 << self.ansatz.n_qubits

    @property
    def target(self) -> str:
        """Return the device's name; "none" for no device."""
        return NO_DEVICE if self.device is None else self.device.name

    def exact_probabilities(self, angles: Tensor) -> Tensor:
        """Simulate it exactly, see `AnsatzKind.probabilities`."""
        return kind_of(self.ansatz).probabilities(self.ansatz, angles)

    def measured(self) -> QuantumCircuit:
        """Return what a sampler runs: the native circuit, or where there is none the logical one."""
        from qpa.circuits.qiskit_files import to_qiskit

        return self.native or to_qiskit(self.ansatz)

    def histogram(self, measured: Tensor) -> Tensor:
        """Return the histogram of the whole circuit from that of `measured`.

        Args:    measured: [n_evaluations, 2**n_qubits].
        """
        if not self.lacks_last_layer:
            return measured
        permutation = kind_of(self.ansatz).last_layer_permutation(self.ansatz)
        if permutation is None:
            raise DocumentError("the native circuit", "its last entangling layer", "none", "transpile again")
        return measured[:, permutation.to(measured.device)]


def load_circuit(context: PassContext, *, native: bool) -> Circuit:
    """Return the run's circuit.

    Args:    native: whether the circuit in the target's own gates is loaded too.
    Raises:  PipelineError: there is no native circuit.
             DocumentError: a file of it is missing or damaged.
    """
    logical = context.document(LogicalCircuit)
    if not native:
        return Circuit.of(logical)
    from qpa.circuits.qiskit_files import load_qpy

    document = context.document(NativeCircuit)
    path = context.files.get(document.qpy)
    circuit = load_qpy(path.read_bytes(), str(path))
    return Circuit(logical.ansatz, circuit, _device(document, context), document.lacks_last_layer)


def files_as_run(native: NativeCircuit, context: PassContext) -> dict[str, Attachment | None]:
    """Return copies of a native circuit's files, for the document of what ran it; named by their digests."""
    files = context.files
    device = native.device and files.put("{sha256}.device", files.get(native.device).read_bytes())
    return {"circuit": files.put("{sha256}.qpy", files.get(native.qpy).read_bytes()), "device": device}


def _device(document: NativeCircuit, context: PassContext) -> Device | None:
    from qpa.circuits.target_files import load_target
    from qpa.circuits.targets import Device

    if document.target == NO_DEVICE:
        return None
    if document.device is None:
        found, advice = "an older plan, without it", "run `qpa transpile` with `target` again"
        raise DocumentError("the native circuit", "a file of its device", found, advice)
    path = context.files.get(document.device)
    name, calibrated, target = load_target(path.read_bytes(), str(path))
    return Device(name, target, calibrated)
