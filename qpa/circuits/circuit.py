"""The circuit as an object that a source runs, made from the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpa.circuits.ansatz import kind_of
from qpa.documents import Ansatz, LogicalCircuit, NativeCircuit
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from torch import Tensor

NO_DEVICE = "none"


@dataclass(frozen=True)
class Circuit:
    """One parametric circuit.

    Args:    ansatz: which circuit it is.
             native: the same circuit in a device's own gates, with its measurements, as transpile-circuit
             left it; None where it was not loaded.
             target: the device's name; "none" for no device.
    Raises:  DocumentError: this qpa has no such ansatz.
    """

    ansatz: Ansatz
    native: QuantumCircuit | None = None
    target: str = NO_DEVICE

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

    def exact_probabilities(self, angles: Tensor) -> Tensor:
        """Simulate it exactly, see `AnsatzKind.probabilities`."""
        return kind_of(self.ansatz).probabilities(self.ansatz, angles)


def load_circuit(context: PassContext, *, native: bool) -> Circuit:
    """Return the run's circuit.

    Args:    native: whether the circuit in the target's own gates is loaded too.
    Raises:  PipelineError: there is no native circuit.
             DocumentError: its file is missing or damaged.
    """
    logical = context.document(LogicalCircuit)
    if not native:
        return Circuit.of(logical)
    from qpa.circuits.qiskit_files import load_qpy

    document = context.document(NativeCircuit)
    path = context.files.get(document.qpy)
    return Circuit(logical.ansatz, load_qpy(path.read_bytes(), str(path)), document.target)
