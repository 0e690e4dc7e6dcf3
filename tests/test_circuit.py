import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit, qasm3
from qiskit.quantum_info import Statevector
from qiskit_aer import AerSimulator

from qpa.circuits.circuit import Circuit
from qpa.circuits.qiskit_files import dump_qpy, load_qpy, to_openqasm3, to_qiskit
from qpa.documents import Ansatz, Attachment, LogicalCircuit, Provenance
from qpa.errors import DocumentError
from tests.chains import chain, ry_cnot_chain

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5))


def random_angles(shape, seed):
    return np.random.default_rng(seed).uniform(-math.pi, math.pi, shape)


def amplitudes(angles):
    """Apply the document's words gate by gate: qubit k is bit n-1-k of the index."""
    n_layers, n_qubits = angles.shape
    state = np.eye(2**n_qubits)[0]
    masks = [1 << (n_qubits - 1 - qubit) for qubit in range(n_qubits)]
    index = np.arange(2**n_qubits)
    for layer in range(n_layers):
        for qubit, mask in enumerate(masks):
            sign = np.where(index & mask, 1.0, -1.0)
            half = angles[layer, qubit] / 2
            state = math.cos(half) * state + math.sin(half) * sign * state[index ^ mask]
        for control, target in pairwise(masks):
            state = state[np.where(index & control, index ^ target, index)]
    return state


def statevector(circuit, angles):
    bound = circuit.assign_parameters(angles.ravel().tolist())
    return Statevector(bound.reverse_bits()).data


@given(SHAPES, st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_statevector_is_the_gate_by_gate_reference(shape, seed):
    angles = random_angles(shape, seed)
    circuit = ry_cnot_chain(*shape, measured=False)
    np.testing.assert_allclose(statevector(circuit, angles), amplitudes(angles), atol=1e-12)


@pytest.mark.parametrize("n_qubits", [1, 2, 4])
def test_the_measured_integer_is_the_chunk_index(n_qubits):
    circuit = ry_cnot_chain(1, n_qubits)
    for qubit in range(n_qubits):
        angles = np.zeros(n_qubits)
        angles[qubit] = math.pi
        bound = circuit.assign_parameters(angles.tolist())
        counts = AerSimulator().run(bound, shots=20).result().get_counts()
        # The chain flips every qubit after the one that is set.
        assert counts == {format(2 ** (n_qubits - qubit) - 1, f"0{n_qubits}b"): 20}


def test_angle_index_is_layer_times_qubits_plus_qubit():
    circuit = ry_cnot_chain(2, 3)
    names = [step.params[0].name for step in circuit.data if step.operation.name == "ry"]
    assert names == [f"t[{index}]" for index in range(6)]
    assert [parameter.name for parameter in ry_cnot_chain(3, 4).parameters] == [f"t[{i}]" for i in range(12)]


def test_to_qiskit_reads_the_document():
    document = LogicalCircuit(
        provenance=Provenance(pass_name="test", options=(), seed=0, qpa_version="0", parents=()),
        ansatz=chain(3, 4),
        n_circuits=2,
        qubit_order="qubit 0 is the most significant bit",
        openqasm=Attachment(file="logical-circuit.qasm", sha256="0" * 64, n_bytes=0),
    )
    ansatz = Circuit.of(document).ansatz
    assert to_qiskit(ansatz) == ry_cnot_chain(3, 4)
    assert to_qiskit(ansatz, measured=False) == ry_cnot_chain(3, 4, measured=False)
    assert to_qiskit(ansatz, measured=False).num_clbits == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "^the circuit: expected the ansatz ry-cnot-chain, .*, found magic"),
        (
            {"n_angles": 13},
            "^the circuit: expected the record .*n_angles=12, found .*n_angles=13; plan again",
        ),
        ({"entanglement": "full"}, "^the circuit: expected the record .*'linear'"),
    ],
)
def test_a_circuit_that_this_qpa_does_not_know_is_refused(change, message):
    with pytest.raises(DocumentError, match=message):
        Circuit(Ansatz(**chain(3, 4).model_dump() | change))


def test_openqasm_of_two_qubits_and_one_layer():
    assert to_openqasm3(ry_cnot_chain(1, 2)) == (
        "OPENQASM 3.0;\n"
        'include "stdgates.inc";\n'
        "input float[64] _t_0_;\n"
        "input float[64] _t_1_;\n"
        "bit[2] c;\n"
        "qubit[2] q;\n"
        "ry(_t_0_) q[0];\n"
        "ry(_t_1_) q[1];\n"
        "cx q[0], q[1];\n"
        "c[1] = measure q[0];\n"
        "c[0] = measure q[1];\n"
    )


@given(SHAPES, st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_openqasm_reads_back_as_the_same_circuit(shape, seed):
    angles = random_angles(shape, seed)
    again = qasm3.loads(to_openqasm3(ry_cnot_chain(*shape)))
    measured = {
        (again.find_bit(s.qubits[0]).index, again.find_bit(s.clbits[0]).index) for s in measures(again)
    }
    again.remove_final_measurements()
    bound = again.assign_parameters({f"_t_{index}_": angle for index, angle in enumerate(angles.ravel())})
    np.testing.assert_allclose(Statevector(bound.reverse_bits()).data, amplitudes(angles), atol=1e-12)
    assert measured == {(qubit, shape[1] - 1 - qubit) for qubit in range(shape[1])}


def measures(circuit):
    return [step for step in circuit.data if step.operation.name == "measure"]


@given(SHAPES, st.integers(0, 2**32), st.booleans())
@settings(max_examples=10, deadline=None)
def test_qpy_reads_back_as_the_same_circuit(shape, seed, measured):
    circuit = ry_cnot_chain(*shape, measured=measured)
    again = load_qpy(dump_qpy(circuit), "circuit.qpy")
    assert again == circuit
    assert dump_qpy(again) == dump_qpy(circuit)
    # The vector survives, so that angles are bound by position also beyond t[9].
    assert list(again.parameters) == list(circuit.parameters)
    angles = random_angles(shape, seed).ravel().tolist()
    assert again.assign_parameters(angles) == circuit.assign_parameters(angles)


def test_qpy_has_the_same_bytes_in_every_process():
    script = (
        "import sys; from qpa.circuits.qiskit_files import *; from qpa.circuits.ansatz import make_ansatz; "
        "sys.stdout.write(dump_qpy(to_qiskit(make_ansatz('ry-cnot-chain', 3, 2))).hex())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert outputs == {dump_qpy(ry_cnot_chain(2, 3)).hex()}


def test_circuits_of_different_shapes_do_not_share_parameters():
    assert ry_cnot_chain(1, 2).parameters[0] == ry_cnot_chain(1, 2).parameters[0]
    assert ry_cnot_chain(1, 2).parameters[0] != ry_cnot_chain(2, 1).parameters[0]


@pytest.mark.parametrize("content", [b"", b"QISKIT", b"no qpy at all", dump_qpy(QuantumCircuit(1))[:-3]])
def test_what_is_no_qpy_is_an_error_in_one_line(content):
    with pytest.raises(DocumentError, match=r"^some\.qpy: expected a QPY file that this Qiskit reads, found"):
        load_qpy(content, "some.qpy")


def test_a_qpy_file_of_two_circuits_is_an_error(tmp_path):
    from qiskit import qpy

    with (tmp_path / "two.qpy").open("wb") as file:
        qpy.dump([QuantumCircuit(1), QuantumCircuit(1)], file)
    with pytest.raises(DocumentError, match="expected one circuit, found 2 circuits"):
        load_qpy((tmp_path / "two.qpy").read_bytes(), "two.qpy")


def test_qiskit_is_not_imported_before_it_is_used():
    script = (
        "import sys, qpa.circuits.ry_cnot_chain, qpa.passes.synthesize_circuit, qpa.passes.transpile_circuit;"
        "sys.exit('qiskit' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
