"""Orthogonal matrices of RY and CZ: those of the circuit, orthogonal for every side, and differentiable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.quantum_info import Operator

from qpa.circuits.two_design import (
    orthogonal_columns,
    two_design_angles,
    two_design_circuits,
    two_design_qubits,
)


def random_angles(side, n_layers, n_matrices=2):
    shape = (n_matrices, two_design_circuits(side), two_design_angles(two_design_qubits(side), n_layers))
    random = torch.Generator().manual_seed(side)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def circuit_of(angles, n_qubits, n_layers):
    """Return the same circuit in Qiskit, with qubit 0 as the most significant bit."""
    circuit, left = QuantumCircuit(n_qubits), iter(angles)
    for qubit in range(n_qubits):
        circuit.ry(next(left), qubit)
    for first in (0, 1) * n_layers:
        for qubit in range(first, n_qubits - 1, 2):
            circuit.cz(qubit, qubit + 1)
            circuit.ry(next(left), qubit)
            circuit.ry(next(left), qubit + 1)
    assert next(left, None) is None
    return circuit.reverse_bits()


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("n_qubits", [1, 2, 3, 6])
def test_the_columns_are_those_of_the_circuit(n_qubits, n_layers):
    angles = random_angles(2**n_qubits, n_layers)
    found = orthogonal_columns(angles, 2**n_qubits, 2, n_layers)
    for matrix, (own,) in zip(found, angles.tolist(), strict=True):
        expected = Operator(circuit_of(own, n_qubits, n_layers)).data[:, :2]
        np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(side=st.integers(2, 70), n_layers=st.integers(1, 3), data=st.data())
def test_columns_of_every_side_are_orthonormal_and_fewer_are_the_first_of_them(side, n_layers, data):
    n_columns = data.draw(st.integers(1, side))
    angles = random_angles(side, n_layers)
    whole = orthogonal_columns(angles, side, side, n_layers)
    torch.testing.assert_close(whole.mT @ whole, torch.eye(side, dtype=torch.float64).expand(2, -1, -1))
    torch.testing.assert_close(orthogonal_columns(angles, side, n_columns, n_layers), whole[..., :n_columns])


def test_two_circuits_reach_every_row_of_a_side_that_is_no_power_of_two():
    columns = orthogonal_columns(random_angles(12, 1), 12, 3, 1)
    assert bool((columns != 0).all())


@pytest.mark.parametrize("side", [8, 11])
def test_gradients_are_those_of_finite_differences(side):
    angles = random_angles(side, 2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a: orthogonal_columns(a, side, 3, 2), (angles,))


@pytest.mark.parametrize(
    ("side", "n_layers", "n_angles"),
    # The paper's formula (2L+1) log2(N) - 2L; a side that is no power of two has two such circuits.
    [(2, 1, 1), (64, 1, 16), (4096, 1, 34), (4096, 3, 78), (172, 1, 2 * 19), (11008, 2, 2 * 61)],
)
def test_a_side_takes_as_many_angles_as_the_formula_says(side, n_layers, n_angles):
    n_qubits = two_design_qubits(side)
    assert two_design_circuits(side) * two_design_angles(n_qubits, n_layers) == n_angles
    assert side < 2 ** (n_qubits + 1)
