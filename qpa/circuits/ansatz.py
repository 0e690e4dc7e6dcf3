"""What an ansatz kind answers, and the kinds there are.

A kind is a class without state, which is asked about the `Ansatz` record of a document. To add a kind, write
a file of its own and add a line to `ANSATZE`.

Bit order, for all kinds: qubit 0 is the most significant bit of the chunk index. Qiskit counts the other way,
so qubit k is measured into classical bit n-1-k, and the measured integer is the chunk index.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from qpa.documents import Ansatz
from qpa.errors import DocumentError, OptionError
from qpa.registry import Registry

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import ParameterVector
    from torch import Tensor

ANGLES = "t"
"""Name of the parameter vector of every circuit: t[i] is angle i, in radians."""


class AnsatzKind(ABC):
    """A family of parametric circuits.

    Class attributes: `name` is kebab-case; `words` tell a user what a layer is, and what its simulation costs
    beside that of ry-cnot-chain (`benchmarks.ansatz_time`); `entanglement` says which qubits a layer
    entangles; `feature_mean` is the mean of sqrt(p * 2**n_qubits) over random angles, which depends on
    whether the amplitudes are real.
    """

    name: ClassVar[str]
    words: ClassVar[str] = ""
    entanglement: ClassVar[str]
    feature_mean: ClassVar[float]

    @abstractmethod
    def n_angles(self, n_qubits: int, n_layers: int) -> int:
        """Return the number of angles of one circuit."""

    @abstractmethod
    def build(self, ansatz: Ansatz, *, has_last_layer: bool = True) -> QuantumCircuit:
        """Return the circuit in Qiskit's terms, from |0..0> and without measurements.

        Args:    has_last_layer: whether the circuit ends with its last entangling layer; without it the
                 histogram is permuted instead, see `last_layer_permutation`.
        Returns: a circuit with the angles of `parameters`.
        """

    def probabilities(self, ansatz: Ansatz, angles: Tensor) -> Tensor:
        """Simulate the circuit exactly, differentiable by autograd.

        Args:    angles: float[n_evaluations, n_angles], radians.
        Returns: float[n_evaluations, 2**n_qubits], indexed by chunk; rows sum to 1.
        """
        from qpa.circuits.sources.statevector import simulate

        return simulate(self.build(ansatz), angles)

    @abstractmethod
    def window_angles(self, ansatz: Ansatz, bits: Tensor) -> Tensor:
        """Return angles that prepare uniform superpositions over windows of basis states.

        Args:    bits: float[n_circuits, n_window_qubits] of zeros and ones: the first bits of the basis
                 states of each circuit's window.
        Returns: float[n_circuits, n_angles], radians.
        """

    @abstractmethod
    def last_layer_permutation(self, ansatz: Ansatz) -> Tensor | None:
        """Return what the last entangling layer does to a histogram, where it is no more than a permutation.

        A circuit without that layer gives probabilities q; those of the whole circuit are q[permutation].

        Returns: int64[2**n_qubits]; None where the layer is no permutation of basis states.
        """


ANSATZE: Registry[AnsatzKind] = Registry(
    "ansatz",
    {
        "ry-cnot-chain": "qpa.circuits.ry_cnot_chain:RY_CNOT_CHAIN",
        "ry-cz-ring": "qpa.circuits.qiskit_ansatze:RY_CZ_RING",
        "real-amplitudes-full": "qpa.circuits.qiskit_ansatze:REAL_AMPLITUDES_FULL",
        "efficient-su2": "qpa.circuits.qiskit_ansatze:EFFICIENT_SU2",
    },
)


def make_ansatz(kind: str, n_qubits: int, n_layers: int) -> Ansatz:
    """Return the record of an ansatz of a kind.

    Raises:  OptionError: there is no such kind.
    """
    known = ANSATZE[kind]
    return Ansatz(
        kind=kind,
        n_qubits=n_qubits,
        n_layers=n_layers,
        entanglement=known.entanglement,
        n_angles=known.n_angles(n_qubits, n_layers),
    )


def kind_of(ansatz: Ansatz) -> AnsatzKind:
    """Return the kind of an ansatz, as a document records it.

    Raises:  DocumentError: this qpa has no such kind, or its circuit has another number of angles.
    """
    try:
        expected = make_ansatz(ansatz.kind, ansatz.n_qubits, ansatz.n_layers)
    except OptionError as error:
        raise DocumentError("the circuit", f"the ansatz {error.expected}", ansatz.kind) from error
    if ansatz != expected:
        raise DocumentError("the circuit", f"the record {expected}", str(ansatz), "plan again")
    return ANSATZE[ansatz.kind]


def parameters(ansatz: Ansatz) -> ParameterVector:
    """Return the angles of a circuit as Qiskit's parameters, the same for every circuit of a shape.

    Qiskit's default is a random identity, with which every QPY file of the same circuit would be another one.
    """
    from qiskit.circuit import ParameterVector

    name = f"{ansatz.kind}-{ansatz.n_layers}x{ansatz.n_qubits}"
    identity = uuid.uuid5(uuid.NAMESPACE_OID, f"qpa:{name}")
    return ParameterVector(ANGLES, ansatz.n_angles, uuid=identity)
