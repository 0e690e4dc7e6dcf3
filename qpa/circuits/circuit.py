"""The circuit as an object that a source runs, made from the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpa.circuits.ansatz import kind_of
from qpa.documents import Ansatz, LogicalCircuit

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from torch import Tensor

NO_DEVICE = "none"


@dataclass(frozen=True)
class Circuit:
    """One parametric circuit.

    Args:    ansatz: which circuit it is.
             native: the same in a device's own gates, with its measurements, as transpile-circuit left it;
             None where it was not loaded.
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
