import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit.quantum_info import Statevector

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.exact import ExactSimulator
from qpa.errors import ShapeError
from tests.chains import chain, ry_cnot_chain, simulate, vjp


def random_angles(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=random, dtype=torch.float64) * 2 * math.pi - math.pi).to(dtype)


def qiskit_probabilities(angles):
    """Run one circuit [n_layers, n_qubits] in Qiskit; qubit 0 is made the most significant bit."""
    circuit = ry_cnot_chain(*angles.shape, measured=False)
    bound = circuit.assign_parameters(angles.flatten().tolist())
    return np.abs(Statevector(bound.reverse_bits()).data) ** 2


def differences(function, angles, step=1e-6):
    """Return central differences of a scalar function in every angle."""
    gradient = torch.zeros_like(angles)
    for index in range(angles.numel()):
        shift = torch.zeros(angles.numel(), dtype=angles.dtype)
        shift[index] = step
        shift = shift.view_as(angles)
        gradient.view(-1)[index] = (function(angles + shift) - function(angles - shift)) / (2 * step)
    return gradient


# Values


@pytest.mark.parametrize("n_qubits", range(1, 12))
def test_probabilities_are_qiskits(n_qubits):
    angles = random_angles(2, 3, n_qubits, seed=n_qubits)
    found = simulate(angles)
    expected = np.stack([qiskit_probabilities(circuit) for circuit in angles])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-13)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_any_shape_is_qiskits(n_circuits, n_layers, n_qubits, seed):
    angles = random_angles(n_circuits, n_layers, n_qubits, seed=seed)
    found = simulate(angles)
    expected = np.stack([qiskit_probabilities(circuit) for circuit in angles])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("n_qubits", [1, 4, 9, 11])
def test_qubit_0_is_the_most_significant_bit(n_qubits):
    angles = torch.zeros(n_qubits, 1, n_qubits)
    for qubit in range(n_qubits):
        angles[qubit, 0, qubit] = math.pi
    found = simulate(angles).argmax(dim=1)
    # The CNOT chain flips every qubit after the one that is set.
    assert found.tolist() == [2 ** (n_qubits - qubit) - 1 for qubit in range(n_qubits)]


def test_angles_of_zero_leave_the_first_state():
    probabilities = simulate(torch.zeros(2, 8, 5))
    expected = torch.zeros(2, 32)
    expected[:, 0] = 1.0
    torch.testing.assert_close(probabilities, expected, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("n_qubits", [1, 2, 7, 10, 13])
def test_float32_is_float64_rounded(n_qubits):
    angles = random_angles(3, 8, n_qubits, dtype=torch.float32)
    single = simulate(angles)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.sum(1), torch.ones(3), atol=1e-5, rtol=0)
    double = simulate(angles.double()).float()
    torch.testing.assert_close(single, double, atol=1e-6, rtol=1e-4)


def test_circuits_of_a_batch_are_independent():
    angles = random_angles(4, 2, 5)
    together = simulate(angles)
    alone = torch.cat([simulate(circuit[None]) for circuit in angles])
    torch.testing.assert_close(together, alone, atol=1e-15, rtol=0)


# Gradients


@pytest.mark.parametrize("n_qubits", range(1, 12))
def test_the_gradient_of_every_angle_is_the_difference_quotient(n_qubits):
    angles = random_angles(2, 2, n_qubits, seed=n_qubits).requires_grad_()
    cotangent = random_angles(2, 2**n_qubits, seed=99)
    (gradient,) = torch.autograd.grad(simulate(angles), angles, cotangent)

    def loss(shifted):
        return (simulate(shifted) * cotangent).sum()

    torch.testing.assert_close(gradient, differences(loss, angles.detach()), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (1, 2, 4), (2, 1, 5)])
def test_gradcheck(shape):
    angles = random_angles(*shape).requires_grad_()
    assert torch.autograd.gradcheck(simulate, (angles,))


@pytest.mark.parametrize("angle", [0.0, math.pi, -math.pi, math.pi / 2])
def test_the_gradient_at_special_angles_is_the_difference_quotient(angle):
    angles = torch.full((1, 3, 4), angle, dtype=torch.float64)
    cotangent = random_angles(1, 16, seed=3)

    def loss(shifted):
        return (simulate(shifted) * cotangent).sum()

    found = vjp(angles, cotangent)
    torch.testing.assert_close(found, differences(loss, angles), atol=1e-8, rtol=1e-6)


def test_vjp_is_what_autograd_gives_and_leaves_its_arguments_alone():
    angles = random_angles(3, 4, 6).requires_grad_()
    cotangent = random_angles(3, 64, seed=1)
    (expected,) = torch.autograd.grad(simulate(angles), angles, cotangent)
    with torch.no_grad():
        found = vjp(angles, cotangent)
    assert torch.equal(found, expected)
    assert angles.grad is None
    assert not found.requires_grad


def test_a_cotangent_that_is_not_contiguous_is_taken():
    angles, cotangent = random_angles(3, 2, 4), random_angles(16, 3, seed=1)
    found = vjp(angles, cotangent.T)
    torch.testing.assert_close(found, vjp(angles, cotangent.T.contiguous()), atol=1e-14, rtol=0)


def test_the_gradient_of_a_constant_is_zero():
    # The probabilities sum to 1, whatever the angles are.
    found = vjp(random_angles(2, 3, 5), torch.ones(2, 32, dtype=torch.float64))
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-14, rtol=0)


def test_a_second_derivative_is_right_or_refused():
    angles = random_angles(1, 1, 1).requires_grad_()
    cosine = 2 * simulate(angles)[0, 0] - 1
    (slope,) = torch.autograd.grad(cosine**2, angles, create_graph=True)
    try:
        slope.sum().backward()
    except RuntimeError as error:
        assert "once_differentiable" in str(error)
    else:
        # The loss is cos(angle) ** 2, whose second derivative is -2 cos(2 angle).
        torch.testing.assert_close(angles.grad, -2 * (2 * angles.detach()).cos())


# Shapes


@pytest.mark.parametrize("shape", [(), (6,), (2, 5), (1, 2, 3), (0, 6), (1, 0), (1, 1, 2, 3)])
def test_angles_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match=r"^angles: expected \[n_evaluations, 6\].* found \["):
        ExactSimulator().probabilities(Circuit(chain(2, 3)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8,), (2, 7), (1, 8), (8, 2), (2, 8, 1)])
def test_a_cotangent_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError, match=r"^cotangent: expected \[2, 8\], found \["):
        vjp(torch.zeros(2, 4, 3), torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_qubits", [1, 4, 8, 11])
def test_cuda_gives_the_numbers_of_the_cpu(n_qubits):
    angles, cotangent = random_angles(3, 4, n_qubits), random_angles(3, 2**n_qubits, seed=1)
    found = simulate(angles.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), simulate(angles), atol=1e-12, rtol=0)
    gradient = vjp(angles.cuda(), cotangent.cuda())
    torch.testing.assert_close(gradient.cpu(), vjp(angles, cotangent), atol=1e-11, rtol=0)
