"""What a LogicalCircuit means, as Qiskit objects, OpenQASM 3 text and QPY bytes.

Bit order: qubit 0 is the most significant bit of the chunk index. Qiskit counts the other way, so
qubit k is measured into classical bit n-1-k, and the measured integer is the chunk index.
"""

from __future__ import annotations

import io
import uuid
from typing import TYPE_CHECKING

from qpa.documents import LogicalCircuit
from qpa.errors import DocumentError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

ANGLES = "t"
"""Name of the parameter vector: t[layer * n_qubits + qubit], radians."""


def ry_cnot_chain(n_layers: int, n_qubits: int, *, measured: bool = True) -> QuantumCircuit:
    """Build the parametric circuit: layers of RY on every qubit, each followed by a linear CNOT chain.

    |0..0>, then n_layers times [RY(t[layer, qubit]) on every qubit; CNOT(0,1) .. CNOT(n-2,n-1)].

    Args:    measured: end with qubit k measured into classical bit n-1-k. Without it there are no
             classical bits, and `Statevector(circuit.reverse_bits())` is indexed by chunk.
    Returns: a circuit with the ParameterVector "t" of n_layers * n_qubits angles, radians. Circuits of
             one shape share their parameters.
    Source:  arXiv 2410.09846, section 3; bit order ours.
    """
    from qiskit import QuantumCircuit
    from qiskit.circuit import ParameterVector

    name = f"ry-cnot-chain-{n_layers}x{n_qubits}"
    # A random identity, Qiskit's default, would make every QPY file of the same circuit another one.
    identity = uuid.uuid5(uuid.NAMESPACE_OID, f"qpa:{name}")
    angles = ParameterVector(ANGLES, n_layers * n_qubits, uuid=identity)
    circuit = QuantumCircuit(n_qubits, n_qubits if measured else 0, name=name)
    for layer in range(n_layers):
        for qubit in range(n_qubits):
            circuit.ry(angles[layer * n_qubits + qubit], qubit)
        for qubit in range(n_qubits - 1):
            circuit.cx(qubit, qubit + 1)
    if measured:
        circuit.measure(range(n_qubits), range(n_qubits)[::-1])
    return circuit


def to_qiskit(document: LogicalCircuit, *, measured: bool = True) -> QuantumCircuit:
    """Build one of the document's `n_circuits` equal circuits, as `ry_cnot_chain` does."""
    return ry_cnot_chain(document.n_layers, document.n_qubits, measured=measured)


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
    Raises:  DocumentError: no QPY, one of a newer Qiskit, or not one circuit.
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
