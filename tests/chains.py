"""The chain of RY and CNOT by numbers of layers and qubits, with angles [n_circuits, n_layers, n_qubits]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.qiskit_files import to_qiskit
from qpa.circuits.sources.exact import ExactSimulator
from qpa.documents import Ansatz


def chain(n_layers: int, n_qubits: int) -> Ansatz:
    """Return the record of a chain."""
    return make_ansatz("ry-cnot-chain", n_qubits, n_layers)


def ry_cnot_chain(n_layers: int, n_qubits: int, *, measured: bool = True) -> Any:
    """Return the chain as a circuit of Qiskit."""
    return to_qiskit(chain(n_layers, n_qubits), measured=measured)


def simulate(angles: Tensor) -> Tensor:
    """Return the exact probabilities, float[n_circuits, 2**n_qubits]."""
    return ExactSimulator().probabilities(Circuit(chain(*angles.shape[1:])), angles.flatten(1))


def vjp(angles: Tensor, cotangent: Tensor) -> Tensor:
    """Return the adjoint gradient, of the angles' shape."""
    circuit = Circuit(chain(*angles.shape[1:]))
    return Adjoint().vjp(ExactSimulator(), circuit, angles.flatten(1), None, cotangent).view_as(angles)
