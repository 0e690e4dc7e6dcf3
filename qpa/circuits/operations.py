"""Where the operations of a Qiskit circuit are: Qiskit numbers the qubits of a circuit, and not of a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import CircuitInstruction


def qubits_of(step: CircuitInstruction, circuit: QuantumCircuit) -> tuple[int, ...]:
    """Return the numbers of the qubits that an operation of a circuit is on, in the operation's order."""
    return tuple(circuit.find_bit(qubit).index for qubit in step.qubits)
