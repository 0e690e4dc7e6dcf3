import itertools
import math

import pytest
import torch

from benchmarks import mitigation as benchmark
from benchmarks.sampled_circuits import circuit_on
from qpa.circuits.ansatz import ANSATZE, make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.surrogate import apply_channel
from qpa.circuits.mitigation.depolarizing import Depolarizing, reference_angles
from qpa.circuits.mitigation.mitigation import (
    MITIGATIONS,
    RECOMMENDED,
    calibrate,
    corrected,
    nearest_distribution,
    parse_mitigations,
)
from qpa.circuits.mitigation.readout import ONES, ZEROS, Readout, prepared
from qpa.circuits.mitigation.zero_noise import FOLDED, ZeroNoise, folded
from qpa.circuits.qiskit_files import to_qiskit
from qpa.circuits.sources.noisy import NoisySimulator
from qpa.circuits.sources.sampled import SampledSource
from qpa.circuits.sources.source import SourceSettings
from qpa.circuits.targets import restrict
from qpa.errors import OptionError, TargetError

UNEVEN = [(0.02, 0.05), (0.01, 0.08), (0.04, 0.03), (0.0, 0.1)]
EVEN = [(0.02, 0.02), (0.01, 0.01), (0.06, 0.06), (0.0, 0.0)]


class Channel(SampledSource):
    """A device whose gates depolarise and whose readout flips, without the noise of shots.

    Its counts are those that 1e12 shots are expected to give.
    """

    name = "channel"
    runs_native = False

    def __init__(self, kept=1.0, flips=EVEN[3:] * 4):
        super().__init__(SourceSettings())
        self.kept, self.flips = kept, torch.tensor(flips, dtype=torch.float64)
        self.runs_of_calls = ()

    def sampler(self, circuit, seed):
        raise NotImplementedError

    def counts(self, circuit, angles, change=None):
        self.runs_of_calls += (len(angles),)
        plain = to_qiskit(circuit.ansatz)
        runs = change(plain) if change else plain
        if runs.num_parameters:
            exact = circuit.exact_probabilities(angles.double())
            order = circuit.histogram(torch.arange(circuit.n_states)[None])[0]
            exact = torch.zeros_like(exact).index_copy_(1, order, exact)
            kept = self.kept ** (runs.num_nonlocal_gates() / plain.num_nonlocal_gates())
        else:  # qubits that are left at 0, or turned to 1
            exact = torch.zeros(1, circuit.n_states, dtype=torch.float64)
            exact[0, -1 if runs.count_ops().get("x") else 0] = 1
            kept = 1.0
        n_qubits = circuit.ansatz.n_qubits
        channel = torch.cat((torch.tensor([kept], dtype=torch.float64), self.flips[:n_qubits].flatten()))
        return (apply_channel(exact, channel) * 1e12).round().long()


def mitigated(text, source, circuit, angles):
    mitigations = parse_mitigations(text)
    calibration = calibrate(mitigations, source, circuit, angles)
    return corrected(mitigations, source.counts(circuit, angles), circuit, calibration)


def some_angles(circuit, n_circuits=1):
    random = torch.Generator().manual_seed(1)
    return torch.randn(n_circuits, circuit.n_angles, generator=random, dtype=torch.float64)


def distance(probabilities, circuit, angles):
    return float(0.5 * (probabilities - circuit.exact_probabilities(angles)).abs().sum(1).max())


@pytest.mark.parametrize("lacks_last_layer", [False, True])
@pytest.mark.parametrize("kind", list(ANSATZE))
@pytest.mark.parametrize(
    ("text", "kept", "flips"),
    [
        ("readout", 1.0, UNEVEN),
        ("depolarizing", 0.6, EVEN),
        ("zne", 0.6, EVEN[3:] * 4),
        ("readout+depolarizing", 0.6, UNEVEN),
        ("readout+zne", 0.6, UNEVEN),
    ],
)
def test_errors_of_its_model_are_undone_exactly(text, kept, flips, kind, lacks_last_layer):
    circuit = Circuit(make_ansatz(kind, 4, 2), lacks_last_layer=lacks_last_layer)
    angles, source = some_angles(circuit, 2), Channel(kept, flips)
    assert distance(mitigated("none", source, circuit, angles), circuit, angles) > 0.05
    assert distance(mitigated(text, source, circuit, angles), circuit, angles) < 1e-5


def test_the_permutation_follows_the_mitigation():
    circuit = Circuit(make_ansatz("ry-cnot-chain", 3, 1), lacks_last_layer=True)
    counts = torch.tensor([[0, 0, 0, 0, 0, 0, 90, 10]])
    calibration = {  # the last qubit's 0 is read as 1 in one shot of ten
        ZEROS: torch.tensor([[90, 10, 0, 0, 0, 0, 0, 0]]),
        ONES: torch.tensor([[0, 0, 0, 0, 0, 0, 0, 100]]),
    }
    found = corrected([Readout()], counts, circuit, calibration)
    # 110 was measured, and CNOT(0, 1), CNOT(1, 2) make 100 of it.
    torch.testing.assert_close(found, torch.eye(8)[None, 0b100])


@pytest.mark.parametrize("n_circuits", [1, 3])
@pytest.mark.parametrize("name", list(MITIGATIONS))
def test_a_calibration_makes_the_calls_that_it_says(name, n_circuits):
    circuit, source = Circuit(make_ansatz("ry-cnot-chain", 3, 2)), Channel()
    (mitigation,) = parse_mitigations(name)
    mitigation.calibrate(source, circuit, some_angles(circuit, n_circuits))
    assert source.runs_of_calls == mitigation.calls(circuit, n_circuits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "^mitigation: expected readout, depolarizing or zne, found magic"),
        ("readout+readout", "^mitigation: expected every name once, found"),
        ("depolarizing+readout", "^mitigation: expected depolarizing as the last, found depolarizing"),
        ("readout+depolarizing+zne", "^mitigation: expected depolarizing as the last, found readout"),
        ("", "^mitigation: expected readout, depolarizing or zne, found"),
    ],
)
def test_mitigations_that_do_not_go_together_are_refused(text, message):
    with pytest.raises(OptionError, match=message):
        parse_mitigations(text)


def test_mitigations_are_found_by_their_names():
    assert parse_mitigations("none") == []
    assert [type(one) for one in parse_mitigations("readout+zne")] == [Readout, ZeroNoise]
    assert [type(one) for one in parse_mitigations(RECOMMENDED)] == [Depolarizing]


def test_the_nearest_distribution_is_the_nearest_of_all():
    random = torch.Generator().manual_seed(0)
    measured = torch.randn(50, 4, generator=random, dtype=torch.float64)
    measured += (1 - measured.sum(1, keepdim=True)) / 4
    found = nearest_distribution(measured)
    for row, nearest in zip(measured, found, strict=True):
        # On each set of states that keep a probability, the nearest numbers are the old ones less a constant.
        candidates = []
        for n_kept in range(1, 5):
            for kept in map(list, itertools.combinations(range(4), n_kept)):
                candidate = torch.zeros(4, dtype=torch.float64)
                candidate[kept] = row[kept] - (row[kept].sum() - 1) / n_kept
                candidates.append(candidate)
        distributions = [one for one in candidates if one.min() >= 0]
        best = min(distributions, key=lambda one: float((one - row).square().sum()))
        torch.testing.assert_close(nearest, best, atol=1e-12, rtol=0)
    torch.testing.assert_close(nearest_distribution(found), found, atol=1e-12, rtol=0)


def test_what_is_corrected_is_a_distribution():
    circuit = Circuit(make_ansatz("ry-cnot-chain", 4, 2))
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(4, (3, 16), generator=random)
    calibration = calibrate(
        parse_mitigations("readout+zne"), Channel(0.5, UNEVEN), circuit, some_angles(circuit, 3)
    )
    found = corrected(parse_mitigations("readout+zne"), counts, circuit, calibration)
    assert found.dtype == torch.float32
    assert float(found.min()) >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(3))


@pytest.mark.parametrize("kind", list(ANSATZE))
def test_the_reference_ends_in_one_basis_state(kind):
    circuit = Circuit(make_ansatz(kind, 5, 3))
    assert float(circuit.exact_probabilities(reference_angles(circuit)).max()) > 1 - 1e-9


def test_zne_leaves_a_flat_distribution_alone():
    circuit = Circuit(make_ansatz("ry-cnot-chain", 3, 1))
    flat = torch.full((1, 8), 5)
    found = corrected([ZeroNoise()], flat, circuit, {FOLDED: torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5]])})
    torch.testing.assert_close(found, torch.full((1, 8), 0.125))


@pytest.mark.parametrize("target", ["generic:4", "ions:4"])
def test_a_folded_circuit_is_the_same_circuit_with_three_times_the_gates(target):
    from qiskit.quantum_info import Operator

    circuit = circuit_on(target, 3, 2)
    runs, _ = restrict(circuit.native, circuit.device.target)
    changed = folded(runs)
    assert changed.num_nonlocal_gates() == 3 * runs.num_nonlocal_gates() > 0
    assert {step.operation.name for step in changed.data} <= {*runs.count_ops(), "barrier"}
    angles = dict(zip(runs.parameters, some_angles(circuit)[0].tolist(), strict=True))
    plain, tripled = (
        Operator(one.assign_parameters(angles).remove_final_measurements(inplace=False))
        for one in (runs, changed)
    )
    assert plain.equiv(tripled)


def test_a_gate_whose_inverse_the_device_lacks_is_not_folded():
    from qiskit import QuantumCircuit

    circuit = QuantumCircuit(2, 2)
    circuit.iswap(0, 1)
    with pytest.raises(TargetError, match=r"^the device: expected gates on two qubits whose inverses it has"):
        folded(circuit)


@pytest.mark.parametrize("target", ["generic:5", "ions:5"])
@pytest.mark.parametrize("is_restricted", [False, True])
def test_calibration_measures_the_same_qubits_in_native_gates(target, is_restricted):
    circuit = circuit_on(target, 3, 1)
    native, device = circuit.native, circuit.device.target
    if is_restricted:
        native, device = restrict(native, device)

    def measured(one):
        steps = [step for step in one.data if step.operation.name == "measure"]
        return {(one.find_bit(s.qubits[0]).index, one.find_bit(s.clbits[0]).index) for s in steps}

    for is_one in (False, True):
        found = prepared(native, circuit, is_one=is_one)
        assert measured(found) == measured(native)
        assert found.num_nonlocal_gates() == 0
        for step in found.data:
            where = tuple(found.find_bit(qubit).index for qubit in step.qubits)
            assert device.instruction_supported(step.operation.name, where)


@pytest.fixture(scope="module")
def on_torino():
    return circuit_on("fake_torino", 4, 3), NoisySimulator(SourceSettings(1, 20_000))


@pytest.mark.parametrize("text", ["readout", "depolarizing", "readout+depolarizing", "readout+zne"])
def test_mitigation_brings_a_noisy_device_nearer(on_torino, text):
    circuit, source = on_torino
    angles = some_angles(circuit)
    before = distance(mitigated("none", source, circuit, angles), circuit, angles)
    after = distance(mitigated(text, source, circuit, angles), circuit, angles)
    assert after < (0.9 if text == "readout" else 0.6) * before


def test_q_cluster_finds_a_few_centres():
    circuit = Circuit(make_ansatz("ry-cnot-chain", 4, 2))
    angles = torch.zeros(1, circuit.n_angles, dtype=torch.float64)
    angles[0, 0] = math.pi / 2  # half 0000, half a state with three other bits
    source = Channel(1.0, [(0.02, 0.02)] * 4)
    before = distance(mitigated("none", source, circuit, angles), circuit, angles)
    assert distance(benchmark.q_cluster(source, circuit, angles), circuit, angles) < 0.1 * before


def test_mthree_gives_what_readout_gives():
    pytest.importorskip("mthree")
    circuit = Circuit(make_ansatz("ry-cnot-chain", 4, 2), lacks_last_layer=True)
    angles, source = some_angles(circuit), Channel(0.9, UNEVEN)
    found, expected = benchmark.mthree(source, circuit, angles), mitigated("readout", source, circuit, angles)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_shots_are_drawn_from_those_that_were_taken():
    circuit = circuit_on("generic:2", 2, 2)
    pool, angles = benchmark.Pool(circuit), some_angles(circuit)
    all_shots = benchmark.Drawn(pool, benchmark.MOST_SHOTS, 0.0, benchmark.np.random.default_rng(0))
    counts = all_shots.counts(circuit, angles)
    assert int(counts.sum()) == benchmark.MOST_SHOTS
    assert torch.equal(all_shots.counts(circuit, angles), counts)
    assert not torch.equal(all_shots.counts(circuit, angles, folded), counts)
    assert not torch.equal(all_shots.counts(circuit, 2 * angles), counts)
    uneven = benchmark.Drawn(pool, 1000, 1.0, benchmark.np.random.default_rng(0))
    assert uneven.counts(circuit, angles).tolist() == [[1000, 0, 0, 0]]


def test_the_benchmark_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mitigation", "--quick"])
    benchmark.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(benchmark.TOTALS)
    assert all(line.count("**") == 2 for line in lines[2:])
