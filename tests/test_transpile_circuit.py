import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from qiskit import QuantumCircuit
from qiskit.circuit.library import CXGate, Measure
from qiskit.quantum_info import Statevector
from qiskit.transpiler import InstructionProperties, Target

from qpa.circuits.circuit import Circuit
from qpa.circuits.qiskit_files import load_qpy
from qpa.circuits.target_files import dump_target, load_target
from qpa.circuits.targets import duration_s, find_device, success_probability
from qpa.documents import Attachment, GateCount, LogicalCircuit, NativeCircuit, Provenance
from qpa.errors import DocumentError, TargetError
from qpa.generators.generator import layout_of
from qpa.generators.layout_options import LayoutOptions
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import verify
from qpa.store.run_directory import DirectoryStore
from tests.chains import chain, ry_cnot_chain
from tests.small_specs import small_spec


def logical_circuit(n_layers, n_qubits):
    return LogicalCircuit(
        provenance=Provenance(pass_name="test", options=(), seed=0, qpa_version="0", parents=()),
        ansatz=chain(n_layers, n_qubits),
        n_circuits=2,
        qubit_order="qubit 0 is the most significant bit",
        openqasm=Attachment(file="logical-circuit.qasm", sha256="0" * 64, n_bytes=0),
    )


def layout():
    spec = small_spec(1, 2)
    return layout_of(LayoutOptions(generator="state", layers=1), spec, spec.provenance)


def lower(path, target, n_layers, n_qubits, seed=7, **options):
    context = PassContext(seed, DirectoryStore(path), (layout(),))
    document = TranspileCircuit(target, **options).run(logical_circuit(n_layers, n_qubits), context)
    verify(document, "transpile-circuit")
    return document, load_qpy(context.files.get(document.qpy).read_bytes(), document.qpy.file)


def distribution(circuit, angles):
    """Return the exact probability of every measured integer, simulating only the qubits that are used."""
    bound = circuit.assign_parameters(angles.tolist())
    used = sorted({bound.find_bit(qubit).index for step in bound.data for qubit in step.qubits})
    small, read = QuantumCircuit(len(used)), {}
    for step in bound.data:
        qubits = [used.index(bound.find_bit(qubit).index) for qubit in step.qubits]
        if step.operation.name == "measure":
            read[bound.find_bit(step.clbits[0]).index] = qubits[0]
        else:
            small.append(step.operation, qubits)
    return Statevector(small).probabilities([read[bit] for bit in range(len(read))])


@pytest.mark.parametrize(
    ("target", "n_layers", "n_qubits"),
    [
        ("none", 2, 3),
        ("generic:1", 2, 1),
        ("generic:5", 3, 5),
        ("generic:27", 8, 4),
        ("fake_torino", 8, 7),
        ("fake_belem", 2, 5),
    ],
)
def test_the_native_circuit_has_the_logical_distribution(tmp_path, target, n_layers, n_qubits):
    document, native = lower(tmp_path, target, n_layers, n_qubits)
    _, whole = lower(tmp_path, target, n_layers, n_qubits, keep_last_layer=True)
    assert document.lacks_last_layer == (target != "none")
    logical, circuit = ry_cnot_chain(n_layers, n_qubits), Circuit(chain(n_layers, n_qubits), native)
    circuit = replace(circuit, lacks_last_layer=document.lacks_last_layer)
    assert [parameter.name for parameter in native.parameters] == [p.name for p in logical.parameters]
    for seed in range(3):
        angles = np.random.default_rng(seed).uniform(-math.pi, math.pi, n_layers * n_qubits)
        expected = distribution(logical, angles)
        np.testing.assert_allclose(distribution(whole, angles), expected, atol=1e-9)
        measured = circuit.histogram(torch.from_numpy(distribution(native, angles))[None])[0]
        np.testing.assert_allclose(measured, expected, atol=1e-9)


def test_no_device_keeps_the_logical_gates(tmp_path):
    document, native = lower(tmp_path, "none", 8, 7)
    assert native == ry_cnot_chain(8, 7)
    assert document.target == "none"
    assert document.n_target_qubits == 7
    assert document.physical_qubits == ()
    assert document.gates == (GateCount(gate="cx", count=48), GateCount(gate="ry", count=56))
    assert document.n_two_qubit_gates == 48
    # Eight layers overlap along the chain: 7 steps for the first, 3 for each other, 1 to measure.
    assert document.depth == 7 + 7 * 3 + 1
    assert document.estimated_success_probability is None


def test_a_linear_chain_needs_no_swap_on_heavy_hex(tmp_path):
    document, native = lower(tmp_path, "fake_torino", 8, 7)
    assert document.n_target_qubits == 133
    assert document.n_two_qubit_gates == 7 * 6
    document, native = lower(tmp_path, "fake_torino", 8, 7, keep_last_layer=True)
    assert document.n_two_qubit_gates == 8 * 6
    assert {count.gate: count.count for count in document.gates}["cz"] == 48
    assert document.depth == native.depth()
    assert 0.6 < document.estimated_success_probability < 0.9
    edges = find_device("fake_torino").target.build_coupling_map().get_edges()
    for pair in pairwise(document.physical_qubits):
        assert pair in edges or pair[::-1] in edges


def test_a_device_without_a_chain_needs_swaps(tmp_path):
    document, _ = lower(tmp_path, "fake_belem", 2, 5)
    assert document.n_two_qubit_gates > 4


def test_of_several_layouts_the_likeliest_is_kept(tmp_path):
    scores = [lower(tmp_path, "fake_torino", 3, 6, layouts=n)[0] for n in (1, 6)]
    one, six = (document.estimated_success_probability for document in scores)
    assert six >= one
    again = lower(tmp_path, "fake_torino", 3, 6, layouts=6)[0]
    assert again.transpiler_seed == scores[1].transpiler_seed


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("target", ["generic:6", "ions:6", "fake_fez"])
def test_every_level_gives_the_distribution_on_every_sort_of_device(tmp_path, level, target):
    document, native = lower(tmp_path, target, 2, 4, optimization_level=level, keep_last_layer=True)
    angles = np.random.default_rng(level).uniform(-math.pi, math.pi, 8)
    expected = distribution(ry_cnot_chain(2, 4), angles)
    np.testing.assert_allclose(distribution(native, angles), expected, atol=1e-9)
    if target == "ions:6":
        assert document.n_two_qubit_gates == 2 * 3


@pytest.mark.parametrize("target", ["fake_torino", "fake_sherbrooke", "generic:9", "ions:5"])
def test_a_device_is_the_same_after_it_was_written_and_read(tmp_path, target):
    device = find_device(target)
    content = dump_target(device.target, device.name, device.calibrated)
    name, calibrated, again = load_target(content, "file")
    assert (name, calibrated) == (device.name, device.calibrated)
    assert dump_target(again, name, calibrated) == content
    document, native = lower(tmp_path, target, 3, 5)
    score = document.estimated_success_probability
    assert success_probability(native, again) == pytest.approx(score)
    assert duration_s(native, again) == pytest.approx(document.duration_s)
    assert document.duration_s > 0


def test_a_damaged_device_is_refused():
    with pytest.raises(DocumentError, match=r"^file: expected a device's file of schema qpa.device/1"):
        load_target(b'{"schema": "qpa.device/2"}', "file")


@pytest.mark.parametrize(
    ("target", "name", "n_qubits"),
    [
        (" NONE ", None, 0),
        ("Generic:07", "generic:7", 7),
        ("FakeTorino", "fake_torino", 133),
        ("FAKE_SHERBROOKE", "fake_sherbrooke", 127),
        ("FakeManilaV2", "fake_manila", 5),
    ],
)
def test_targets_are_found_in_any_spelling(target, name, n_qubits):
    device = find_device(target)
    assert (device and device.name, device and device.target.num_qubits) == (name, n_qubits or None)


def test_a_generic_device_is_a_line():
    edges = set(find_device("generic:4").target.build_coupling_map().get_edges())
    assert edges == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)}


@pytest.mark.parametrize(
    "target", ["generic:abc", "generic:0", "generic", "generic:-1", "generic:1001", "generic:²"]
)
def test_a_wrong_generic_target_is_an_error(target):
    with pytest.raises(
        TargetError, match=rf"^target {target}: expected generic:<qubits> with 1 to 1000 qubits"
    ):
        find_device(target)


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(
        TargetError, match=r"^target fake_torin: .* found no such target; nearest: fake_torino, "
    ):
        find_device("fake_torin")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qiskit_ibm_runtime", None)
    with pytest.raises(TargetError, match=r"^target fake_torino: .*; pip install 'qpa\[ibm\]'$"):
        find_device("fake_torino")


@pytest.mark.parametrize("target", ["generic:4", "fake_belem"])
def test_a_target_that_is_too_small_is_an_error(tmp_path, target):
    n_qubits = find_device(target).target.num_qubits
    with pytest.raises(TargetError) as error:
        lower(tmp_path, target, 1, n_qubits + 1)
    expected = f"at least {n_qubits + 1} qubits, found {n_qubits}; choose a larger device"
    assert str(error.value) == f"target {target}: expected {expected}"
    assert not list(tmp_path.iterdir())


def test_what_qiskit_cannot_transpile_is_an_error(tmp_path, monkeypatch):
    # A device whose two qubits are not connected.
    target = Target(num_qubits=2)
    target.add_instruction(Measure(), {(0,): None, (1,): None})
    device = type("Unconnected", (), {"name": "unconnected", "target": target, "calibrated": None})
    monkeypatch.setattr("qpa.passes.transpile_circuit.find_device", lambda _: device)
    with pytest.raises(
        TargetError, match=r"^target unconnected: expected a device that can carry the circuit"
    ):
        lower(tmp_path, "unconnected", 1, 2)


def two_qubit_target(cx_error):
    target = Target(num_qubits=2)
    target.add_instruction(CXGate(), {(0, 1): InstructionProperties(error=cx_error)})
    target.add_instruction(
        Measure(), {(0,): InstructionProperties(error=0.5), (1,): InstructionProperties(error=0.2)}
    )
    return target


def test_success_probability_is_the_product_over_gates_and_measurements():
    circuit = QuantumCircuit(2, 2)
    circuit.cx(0, 1)
    circuit.cx(0, 1)
    circuit.measure([0, 1], [0, 1])
    assert success_probability(circuit, two_qubit_target(0.1)) == pytest.approx(0.9 * 0.9 * 0.5 * 0.8)
    assert success_probability(circuit, two_qubit_target(1.0)) == 0.0
    assert success_probability(circuit, two_qubit_target(None)) is None
    assert success_probability(circuit, two_qubit_target(math.nan)) is None


def test_provenance_names_the_target_as_it_was_given(tmp_path):
    document, _ = lower(tmp_path, "FakeTorino", 1, 2, seed=11)
    made = document.provenance
    assert (made.pass_name, made.seed) == ("transpile-circuit", 11)
    assert (made.options[0].name, made.options[0].value) == ("target", "FakeTorino")
    assert document.target == "fake_torino"


SCRIPT = """
import sys
from pathlib import Path
from qpa.documents import LogicalCircuit, WeightLayout
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore

path = Path(sys.argv[1])
source = LogicalCircuit.from_json((path / "logical-circuit.json").read_bytes(), "source")
layout = WeightLayout.from_json((path / "weight-layout.json").read_bytes(), "layout")
for target in ("fake_torino", "fake_belem", "generic:9"):
    document = TranspileCircuit(target).run(source, PassContext(7, DirectoryStore(path), (layout,)))
    sys.stdout.write(document.to_json().decode())
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path):
    (tmp_path / "logical-circuit.json").write_bytes(logical_circuit(3, 5).to_json())
    (tmp_path / "weight-layout.json").write_bytes(layout().to_json())
    # The document holds the QPY file's SHA-256, so equal documents mean equal files.
    here = "".join(
        lower(tmp_path, target, 3, 5)[0].to_json().decode()
        for target in ("fake_torino", "fake_belem", "generic:9")
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        assert there == here


def test_run_leaves_two_files_and_their_digests(tmp_path):
    document, _ = lower(tmp_path, "generic:3", 1, 2)
    assert isinstance(document, NativeCircuit)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"native-circuit.qpy", "native-circuit.device"}
    assert names == {document.qpy.file, document.device.file}


@pytest.mark.parametrize("target", ["generic:27", "fake_torino", "fake_belem"])
def test_physical_qubits_are_where_the_first_layer_acts(tmp_path, target):
    document, native = lower(tmp_path, target, 2, 5)
    place = {
        parameter.index: native.find_bit(step.qubits[0]).index
        for step in native.data
        for value in step.operation.params
        for parameter in getattr(value, "parameters", ())
    }
    assert document.physical_qubits == tuple(place[qubit] for qubit in range(5))
