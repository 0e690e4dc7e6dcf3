"""Every ansatz kind that qpa brings, against Qiskit's simulator and Qiskit's circuit library."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit.circuit.library import efficient_su2, n_local, real_amplitudes
from qiskit.quantum_info import Operator, Statevector

from qpa.circuits.ansatz import ANSATZE, AnsatzKind, make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.parameter_shift import ParameterShift
from qpa.circuits.qiskit_files import dump_qpy, load_qpy, to_qiskit
from qpa.generators.features.states import state_bits

KINDS = (*ANSATZE,)
COMPLEX = ("efficient-su2",)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize("n_qubits", [1, 2, 3, 4, 5])


def random_angles(ansatz, n_circuits=2, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    shape = (n_circuits, ansatz.n_angles)
    return (torch.rand(shape, generator=random, dtype=torch.float64) * 2 * math.pi - math.pi).to(dtype)


def bind(circuit, angles):
    return circuit.assign_parameters(angles.tolist())


def qiskit_probabilities(circuit, angles):
    """Return float64[n_circuits, 2**n_qubits], qubit 0 the most significant bit."""
    states = [Statevector(bind(circuit, row).reverse_bits()).data for row in angles]
    return torch.tensor(np.abs(np.stack(states)) ** 2)


def assert_close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# Simulation


@every_kind
@every_size
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_probabilities_are_qiskits(kind, n_qubits, n_layers):
    ansatz = make_ansatz(kind, n_qubits, n_layers)
    angles = random_angles(ansatz)
    found = Circuit(ansatz).exact_probabilities(angles)
    assert found.dtype == torch.float64
    assert_close(found, qiskit_probabilities(to_qiskit(ansatz, measured=False), angles))


@every_kind
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_any_shape_is_the_simulation_gate_by_gate(kind, n_layers, n_qubits, seed):
    ansatz = make_ansatz(kind, n_qubits, n_layers)
    angles = random_angles(ansatz, seed=seed).requires_grad_()
    own = Circuit(ansatz).exact_probabilities(angles)
    by_gates = AnsatzKind.probabilities(ANSATZE[kind], ansatz, angles)
    assert_close(own, by_gates)
    cotangent = torch.rand_like(own)
    assert_close(*(torch.autograd.grad(p, angles, cotangent)[0] for p in (own, by_gates)))


@every_kind
@pytest.mark.parametrize("n_qubits", [2, 7, 11])
def test_float32_is_float64_rounded(kind, n_qubits):
    ansatz = make_ansatz(kind, n_qubits, 5)
    angles = random_angles(ansatz, dtype=torch.float32)
    single = Circuit(ansatz).exact_probabilities(angles)
    assert single.dtype == torch.float32
    assert_close(single.sum(1), torch.ones(2), atol=1e-5)
    assert_close(single, Circuit(ansatz).exact_probabilities(angles.double()).float(), atol=1e-6)


@every_kind
def test_circuits_of_a_batch_are_independent(kind):
    ansatz = make_ansatz(kind, 5, 3)
    angles = random_angles(ansatz, n_circuits=4)
    together = Circuit(ansatz).exact_probabilities(angles)
    alone = torch.cat([Circuit(ansatz).exact_probabilities(row[None]) for row in angles])
    assert_close(together, alone, atol=1e-15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
@pytest.mark.parametrize("n_qubits", [1, 4, 11])
def test_cuda_gives_the_numbers_of_the_cpu(kind, n_qubits):
    ansatz = make_ansatz(kind, n_qubits, 4)
    angles = random_angles(ansatz)
    found = Circuit(ansatz).exact_probabilities(angles.cuda())
    assert found.device.type == "cuda"
    assert_close(found.cpu(), Circuit(ansatz).exact_probabilities(angles))


# Gradients


@every_kind
@every_size
def test_gradients_are_those_of_shifted_runs_and_of_differences(kind, n_qubits):
    ansatz = make_ansatz(kind, n_qubits, 3)
    angles = random_angles(ansatz, seed=n_qubits).requires_grad_()
    cotangent = torch.rand(2, 2**n_qubits, dtype=torch.float64)
    circuit, step = Circuit(ansatz), 1e-6
    (gradient,) = torch.autograd.grad(circuit.exact_probabilities(angles), angles, cotangent)
    shifted = Execution(circuit, gradient=ParameterShift()).run(angles)
    assert_close(gradient, torch.autograd.grad(shifted, angles, cotangent)[0])
    for angle in range(ansatz.n_angles):
        moved = torch.zeros_like(angles)
        moved[:, angle] = step
        above, below = (circuit.exact_probabilities(angles.detach() + sign * moved) for sign in (1, -1))
        difference = ((above - below) * cotangent).sum(1) / (2 * step)
        assert_close(gradient[:, angle], difference, atol=1e-8)


@every_kind
def test_every_angle_changes_a_probability(kind):
    ansatz = make_ansatz(kind, 3, 3)
    angles = random_angles(ansatz, n_circuits=1).requires_grad_()
    (jacobian,) = torch.autograd.functional.jacobian(Circuit(ansatz).exact_probabilities, (angles,))
    assert float(jacobian.abs().amax((0, 1, 2)).min()) > 1e-3


# Records and circuits


@every_kind
def test_the_record_of_a_kind(kind):
    assert ANSATZE[kind].name == kind
    ansatz = make_ansatz(kind, 4, 3)
    assert ansatz.n_angles == (20 if kind in COMPLEX else 12)
    assert make_ansatz(kind, 1, 1).n_angles == 1
    names = [parameter.name for parameter in to_qiskit(ansatz).parameters]
    assert names == [f"t[{index}]" for index in range(ansatz.n_angles)]


@every_kind
def test_angles_are_in_the_order_of_the_gates(kind):
    circuit = to_qiskit(make_ansatz(kind, 3, 3), measured=False)
    used = [step.params[0].index for step in circuit.data if step.operation.name in ("ry", "rz")]
    assert used == [*range(len(used))]


@every_kind
def test_qpy_reads_back_as_the_same_circuit(kind):
    circuit = to_qiskit(make_ansatz(kind, 4, 3))
    again = load_qpy(dump_qpy(circuit), "circuit.qpy")
    assert again == circuit and list(again.parameters) == list(circuit.parameters)


@every_kind
def test_the_mean_of_features_is_that_of_random_angles(kind):
    ansatz = make_ansatz(kind, 7, 16)
    probabilities = Circuit(ansatz).exact_probabilities(random_angles(ansatz, n_circuits=200))
    found = float((probabilities * 2**7).sqrt().mean())
    tolerance = 0.03 if kind == "ry-cz-ring" else 0.005
    assert found == pytest.approx(ANSATZE[kind].feature_mean, abs=tolerance)


# The last layer


@every_kind
@every_size
@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_last_layer_is_a_permutation_of_the_histogram(kind, n_qubits, n_layers):
    ansatz = make_ansatz(kind, n_qubits, n_layers)
    angles = random_angles(ansatz)
    bare = ANSATZE[kind].build(ansatz, has_last_layer=False)
    permutation = ANSATZE[kind].last_layer_permutation(ansatz)
    assert permutation.dtype == torch.int64 and permutation.device.type == "cpu"
    assert permutation.sort().values.tolist() == [*range(2**n_qubits)]
    whole = qiskit_probabilities(to_qiskit(ansatz, measured=False), angles)
    assert_close(qiskit_probabilities(bare, angles)[:, permutation], whole)


@every_kind
def test_only_the_last_entangling_layer_is_left_out(kind):
    ansatz = make_ansatz(kind, 4, 3)
    whole, bare = (ANSATZE[kind].build(ansatz, has_last_layer=has_last) for has_last in (True, False))
    n_whole, n_bare = (circuit.num_nonlocal_gates() for circuit in (whole, bare))
    assert n_whole % 3 == 0 and n_bare == n_whole * 2 // 3 and n_whole > 0
    assert [*bare.parameters] == [*whole.parameters]


# Windows


@every_kind
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize(("n_qubits", "n_window_qubits"), [(1, 0), (1, 1), (3, 0), (5, 1), (5, 3), (4, 4)])
def test_windows_are_uniform(kind, n_layers, n_qubits, n_window_qubits):
    ansatz = make_ansatz(kind, n_qubits, n_layers)
    n_windows, n_inside = 2**n_window_qubits, 2 ** (n_qubits - n_window_qubits)
    bits = state_bits(n_windows, n_window_qubits).double()
    given_bits = bits.clone()
    angles = ANSATZE[kind].window_angles(ansatz, bits)
    assert torch.equal(bits, given_bits)
    assert (angles.dtype, angles.shape) == (torch.float64, (n_windows, ansatz.n_angles))
    expected = torch.eye(n_windows).double().repeat_interleave(n_inside, dim=1) / n_inside
    assert_close(Circuit(ansatz).exact_probabilities(angles), expected)


# Qiskit's circuit library

LIBRARY = {
    "ry-cnot-chain": lambda n_qubits, **size: real_amplitudes(n_qubits, "linear", **size),
    "ry-cz-ring": lambda n_qubits, **size: n_local(n_qubits, "ry", "cz", "circular", **size),
    "real-amplitudes-full": lambda n_qubits, **size: real_amplitudes(n_qubits, "full", **size),
    "efficient-su2": lambda n_qubits, **size: efficient_su2(n_qubits, entanglement="linear", **size),
}


def of_library(ansatz):
    """Return Qiskit's circuit with a layer of two-qubit gates at its end, and how many angles it has more."""
    size = {"reps": ansatz.n_layers, "skip_final_rotation_layer": True}
    circuit = LIBRARY[ansatz.kind](ansatz.n_qubits, **size)
    return circuit, circuit.num_parameters - ansatz.n_angles


def test_every_kind_is_compared_with_the_library():
    assert LIBRARY.keys() == {*KINDS}


@every_kind
@every_size
def test_the_circuit_is_that_of_the_library(kind, n_qubits):
    if kind == "ry-cz-ring" and n_qubits == 1:
        pytest.skip("Qiskit refuses it")
    ansatz = make_ansatz(kind, n_qubits, 2)
    circuit, n_more = of_library(ansatz)
    assert n_more == (n_qubits if kind in COMPLEX else 0)
    angles = random_angles(ansatz)[0]
    ours = bind(to_qiskit(ansatz, measured=False), angles)
    theirs = bind(circuit, torch.cat((angles, angles.new_zeros(n_more))))
    assert Operator(ours).equiv(Operator(theirs)), "up to a global phase"
    np.testing.assert_allclose(Statevector(ours).data, Statevector(theirs).data, atol=1e-12)
    assert ours.num_nonlocal_gates() == theirs.num_nonlocal_gates()


@every_size
def test_the_chain_is_real_amplitudes_with_linear_entanglement_gate_by_gate(n_qubits):
    ansatz = make_ansatz("ry-cnot-chain", n_qubits, 3)
    angles = random_angles(ansatz)[0]
    theirs = bind(of_library(ansatz)[0], angles)
    assert bind(to_qiskit(ansatz, measured=False), angles) == theirs


@every_size
def test_the_last_rz_of_efficient_su2_would_change_no_probability(n_qubits):
    ansatz = make_ansatz("efficient-su2", n_qubits, 2)
    circuit, n_more = of_library(ansatz)
    angles = random_angles(ansatz)
    more = random_angles(make_ansatz("ry-cnot-chain", n_more, 1), seed=1)
    with_last_rz = qiskit_probabilities(circuit, torch.cat((angles, more), dim=1))
    assert_close(Circuit(ansatz).exact_probabilities(angles), with_last_rz)


@pytest.mark.parametrize("n_qubits", [2, 3, 4, 6])
def test_cnots_of_all_pairs_are_a_reverse_chain_and_undo_a_chain(n_qubits):
    size = {"reps": 1, "skip_final_rotation_layer": True}
    full, reverse = (real_amplitudes(n_qubits, name, **size) for name in ("full", "reverse_linear"))
    zeros = torch.zeros(n_qubits)
    assert Operator(bind(full, zeros)).equiv(Operator(bind(reverse, zeros)))
    of_full, of_chain = (
        ANSATZE[kind].last_layer_permutation(make_ansatz(kind, n_qubits, 1))
        for kind in ("real-amplitudes-full", "ry-cnot-chain")
    )
    assert of_full[of_chain].tolist() == [*range(2**n_qubits)]


@pytest.mark.parametrize(("n_qubits", "depth"), [(1, 0), (2, 1), (3, 3), (4, 2), (7, 3), (8, 2)])
def test_a_ring_of_czs_is_shallow(n_qubits, depth):
    ansatz = make_ansatz("ry-cz-ring", n_qubits, 1)
    circuit = ANSATZE["ry-cz-ring"].build(ansatz)
    assert circuit.depth() == 1 + depth


# What circuits can reach


@every_kind
@pytest.mark.parametrize("n_qubits", [3, 4, 5, 6, 7])
def test_deep_circuits_reach_everything_but_with_a_ring_of_czs(kind, n_qubits):
    ansatz = make_ansatz(kind, n_qubits, 20)
    angles = random_angles(ansatz, n_circuits=1)
    (jacobian,) = torch.autograd.functional.jacobian(Circuit(ansatz).exact_probabilities, (angles,))
    of_ring = n_qubits * (n_qubits - 1) + n_qubits % 2
    expected = of_ring if kind == "ry-cz-ring" else 2**n_qubits - 1
    assert int(torch.linalg.matrix_rank(jacobian[0, :, 0], rtol=1e-9)) == expected


# Imports


def test_qiskit_and_torch_are_not_imported_before_they_are_used():
    script = (
        "import sys; from qpa.circuits.ansatz import *; [make_ansatz(kind, 3, 2) for kind in ANSATZE];"
        "sys.exit('qiskit' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
