"""Circuits as Qiskit objects, OpenQASM 3 text and QPY bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from qpa.circuits.ansatz import kind_of
from qpa.documents import Ansatz
from qpa.errors import DocumentError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit


def to_qiskit(ansatz: Ansatz, *, measured: bool = True, has_last_layer: bool = True) -> QuantumCircuit:
    """Build the circuit of an ansatz.

    Args:    measured: end with qubit k measured into classical bit n-1-k. Without it there are no classical
             bits, and `Statevector(circuit.reverse_bits())` is indexed by chunk.
             has_last_layer: see `AnsatzKind.build`.
    Returns: a circuit with the ParameterVector "t" of n_angles angles, radians. Circuits of one shape share
             their parameters.
    """
    from qiskit import QuantumCircuit

    bare = kind_of(ansatz).build(ansatz, has_last_layer=has_last_layer)
    if not measured:
        return bare
    n_qubits = ansatz.n_qubits
    circuit = QuantumCircuit(n_qubits, n_qubits, name=bare.name)
    circuit.compose(bare, inplace=True)
    circuit.measure(range(n_qubits), range(n_qubits)[::-1])
    return circuit


def to_openqasm3(circuit: QuantumCircuit) -> str:
    """Write a circuit as OpenQASM 3 text that ends in a newline.

    OpenQASM has no array of inputs: angle i is the float input `_t_<i>_`, to be bound by name.
    """
    from qiskit import qasm3

    text: str = qasm3.dumps(circuit)
    return text.rstrip("\n") + "\n"


def dump_qpy(circuit: QuantumCircuit) -> bytes:
    """Write a circuit in Qiskit's QPY format, the same bytes for the same circuit in every process.

    The transpiler's layout is left out; the NativeCircuit document has it as `physical_qubits`.
    """
    from qiskit import qpy

    buffer = io.BytesIO()
    qpy.dump(_without_layout(circuit), buffer)
    return buffer.getvalue()


def load_qpy(content: bytes, subject: str) -> QuantumCircuit:
    """Read the one circuit of a QPY file.

    Qiskit's reader believes the lengths in the file: read only what `FileStore.get` has checked.

    Args:    subject: the file's name, for error messages.
    Raises:  DocumentError: it is no QPY, is from a newer Qiskit, or does not hold exactly one circuit.
    """
    from qiskit import qpy

    try:
        circuits = qpy.load(io.BytesIO(content))
    # Besides QpyError the reader raises whatever the bytes happen to trip over.
    except Exception as error:
        raise DocumentError(subject, "a QPY file that this Qiskit reads", type(error).__name__) from error
    if len(circuits) != 1:
        raise DocumentError(subject, "one circuit", f"{len(circuits)} circuits")
    return circuits[0]


def _without_layout(circuit: QuantumCircuit) -> QuantumCircuit:
    # QPY lists the layout's registers in the order of a Python set, which no seed controls.
    from qiskit import QuantumCircuit

    bare = QuantumCircuit(
        *circuit.qregs, *circuit.cregs, name=circuit.name, global_phase=circuit.global_phase
    )
    for instruction in circuit.data:
        bare.append(instruction)
    return bare
