"""Exact simulation of any circuit, gate by gate, for ansatz kinds that have no faster form of their own.

The state is complex[n_evaluations, 2, .., 2], with an axis for each qubit. A gate without angles is Qiskit's
own matrix; a gate whose one angle is a parameter of the circuit is a rotation exp(-i t/2 P) = cos(t/2) -
i sin(t/2) P of a Pauli P. Autograd differentiates all of it.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qpa.circuits.operations import qubits_of
from qpa.errors import ShapeError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

_PAULIS = {"rx": [[0, 1], [1, 0]], "ry": [[0, -1j], [1j, 0]], "rz": [[1, 0], [0, -1]]}


def simulate(circuit: QuantumCircuit, angles: Tensor) -> Tensor:
    """Return the probabilities of a circuit's basis states, qubit 0 the most significant bit.

    Args:    circuit: from |0..0>, without measurements; its angles are one ParameterVector.
             angles: float[n_evaluations, n_angles], radians.
    Returns: float[n_evaluations, 2**n_qubits].
    Raises:  ShapeError: a gate takes something other than one parameter or numbers.
    """
    n_qubits = circuit.num_qubits
    state = torch.zeros(len(angles), 2**n_qubits, dtype=_complex(angles), device=angles.device)
    state[:, 0] = 1
    state = state.view(-1, *[2] * n_qubits)
    for step in circuit.data:
        state = _apply(_matrices(step.operation, angles), state, qubits_of(step, circuit))
    return state.flatten(1).abs().square()


def _complex(angles: Tensor) -> torch.dtype:
    return torch.complex128 if angles.dtype == torch.float64 else torch.complex64


def _matrices(gate: Any, angles: Tensor) -> Tensor:
    """Return complex[n, 2**k, 2**k], the first qubit most significant; n is 1 for a gate of numbers."""
    dtype = _complex(angles)
    if not any(getattr(parameter, "parameters", ()) for parameter in gate.params):
        matrix = torch.as_tensor(_most_significant_first(gate.to_matrix()), dtype=dtype, device=angles.device)
        return matrix[None]
    (parameter,) = gate.params
    if gate.name not in _PAULIS or not hasattr(parameter, "index"):
        expected = f"one of {', '.join(_PAULIS)} of a single parameter, or a gate of numbers"
        raise ShapeError(f"gate {gate.name}", expected, str(gate.params))
    half = 0.5 * angles[:, parameter.index, None, None]
    pauli = torch.tensor(_PAULIS[gate.name], dtype=dtype, device=angles.device)
    return half.cos() * torch.eye(2, dtype=dtype, device=angles.device) - 1j * half.sin() * pauli


def _most_significant_first(matrix: Any) -> Any:
    """Reorder the axes of Qiskit's matrix of a gate, whose first qubit is the least significant bit."""
    n_qubits = matrix.shape[0].bit_length() - 1
    axes = [*range(n_qubits)[::-1]]
    order = axes + [n_qubits + axis for axis in axes]
    return np.reshape(matrix, [2] * 2 * n_qubits).transpose(order).reshape(matrix.shape)


def _apply(matrices: Tensor, state: Tensor, qubits: Sequence[int]) -> Tensor:
    """Apply a gate's matrices to the axes of its qubits."""
    axes = [qubit + 1 for qubit in qubits]
    last = state.movedim(axes, [*range(-len(axes), 0)])
    columns = last.reshape(len(state), -1, 2 ** len(axes))
    changed = columns @ matrices.mT
    return changed.reshape(last.shape).movedim([*range(-len(axes), 0)], axes)
