"""How far angles move features: estimates against whole Jacobians, and what `qpa inspect` shows of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qpa.circuits import trainability
from qpa.circuits.ansatz import ANSATZE, make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.trainability import (
    Expressivity,
    expressivity_at,
    gradients_at,
    jacobian,
    layer_sizes,
    n_draws_for,
    uniform_angles,
)
from qpa.documents import AdapterSpec, WeightLayout
from qpa.report import trainability as report
from qpa.store.run_directory import RunDirectory
from tests.command_line import Cli

KINDS = [*ANSATZE]
REAL = [name for name in KINDS if name != "efficient-su2"]


def circuit_of(kind: str, n_qubits: int, n_layers: int) -> Circuit:
    return Circuit(make_ansatz(kind, n_qubits, n_layers))


def random_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(circuit: Circuit, n: int, seed: int = 0):
    return uniform_angles(circuit.ansatz, n, random_of(seed))


def root_of(circuit: Circuit, epsilon: float = 0.0):
    return lambda probabilities: torch.sqrt(probabilities * circuit.n_states + epsilon)


@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobian_is_that_of_autograd_in_any_number_of_pieces(kind, monkeypatch):
    circuit = circuit_of(kind, 3, 3)
    angles = drawn(circuit, 1)[0].double()
    some = torch.tensor([5, 0, 6])

    def features(probabilities):
        return root_of(circuit, 0.01)(probabilities)[:, some]

    def of_angles(angles):
        return features(circuit.exact_probabilities(angles[None]))[0]

    found = jacobian(circuit, angles, features)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(of_angles, angles).T)
    monkeypatch.setattr(trainability, "_N_AT_ONCE", 2 * circuit.n_states)
    torch.testing.assert_close(jacobian(circuit, angles, features), found)


@pytest.mark.parametrize("n_qubits", [2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_roots_mean_square_is_a_quarter_at_any_angles_of_real_circuits(kind, n_qubits):
    circuit = circuit_of(kind, n_qubits, 4)
    means = jacobian(circuit, drawn(circuit, 1)[0].double(), root_of(circuit)).square().mean(1)
    if kind in REAL:
        torch.testing.assert_close(means, torch.full_like(means, 0.25))
    assert (means < 0.25 + 1e-9).all()


@pytest.mark.parametrize("kind", ["ry-cnot-chain", "efficient-su2"])
def test_random_signs_estimate_the_mean_over_basis_states(kind):
    circuit = circuit_of(kind, 3, 3)
    angles = drawn(circuit, 1)
    feature = root_of(circuit, 0.01)
    found = gradients_at(circuit, angles.expand(8000, -1), feature, random_of(1))
    assert found.n_draws == 8000
    for estimated, readout in ((found.feature, feature), (found.probability, lambda p: p)):
        squares = jacobian(circuit, angles[0], readout).square().mean(1)
        exact = [float(layer.mean()) for layer in squares.split(found.layer_sizes)]
        assert estimated == pytest.approx(exact, rel=0.05)
    weights = [size / circuit.n_angles for size in found.layer_sizes]
    assert found.mean_feature == pytest.approx(
        sum(a * b for a, b in zip(found.feature, weights, strict=True))
    )


def test_circuits_in_several_pieces_count_alike(monkeypatch):
    circuit = circuit_of("ry-cnot-chain", 3, 2)
    angles = drawn(circuit, 1).expand(4000, -1)
    whole = gradients_at(circuit, angles, root_of(circuit), random_of(0))
    monkeypatch.setattr(trainability, "_N_AT_ONCE", 300 * circuit.n_states)
    pieces = gradients_at(circuit, angles, root_of(circuit), random_of(0))
    assert pieces.feature == pytest.approx(whole.feature, rel=0.1)
    assert pieces.n_draws == whole.n_draws == 4000


def test_the_gradient_of_p_dies_with_the_qubits_and_that_of_the_root_does_not():
    found = {}
    for n_qubits in (4, 7, 10):
        circuit = circuit_of("ry-cnot-chain", n_qubits, 8)
        angles = drawn(circuit, n_draws_for(n_qubits))
        found[n_qubits] = gradients_at(circuit, angles, root_of(circuit, 0.01), random_of(n_qubits))
    for fewer, more in ((4, 7), (7, 10)):
        ratio = found[fewer].mean_probability / found[more].mean_probability
        assert ratio == pytest.approx(4 ** (more - fewer), rel=0.4)
        assert found[more].mean_feature == pytest.approx(found[fewer].mean_feature, rel=0.15)
    assert found[10].mean_feature == pytest.approx(0.221, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_angles_of_the_layers_are_all_angles(kind, n_layers):
    ansatz = make_ansatz(kind, 4, n_layers)
    sizes = layer_sizes(ansatz)
    assert (len(sizes), sum(sizes), sizes[-1]) == (n_layers, ansatz.n_angles, 4)


def test_the_last_layer_of_efficient_su2_is_the_one_without_rz():
    assert layer_sizes(make_ansatz("efficient-su2", 5, 3)) == (10, 10, 5)


def test_layers_are_in_the_order_of_their_angles():
    """Angles of 0 in all layers but the last: of RZ, whose axis the state lies along, nothing moves."""
    circuit = circuit_of("efficient-su2", 3, 2)
    angles = torch.zeros(64, circuit.n_angles)
    angles[:, -3:] = drawn(circuit, 64)[:, -3:]
    first, last = gradients_at(circuit, angles, root_of(circuit, 1e-6), random_of(0)).feature
    assert first == pytest.approx(last / 2, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "n_qubits", "n_layers", "n_directions"),
    [
        ("ry-cnot-chain", 4, 1, 4),  # a product state: an angle a qubit
        ("ry-cnot-chain", 3, 12, 7),  # as many as real states have
        ("efficient-su2", 3, 12, 7),
        ("ry-cz-ring", 4, 12, 12),  # n (n - 1), see qpa.circuits.qiskit_ansatze
        ("ry-cz-ring", 5, 12, 21),  # and one more
    ],
)
def test_directions_are_those_the_circuit_has(kind, n_qubits, n_layers, n_directions, monkeypatch):
    monkeypatch.setattr(trainability, "RANK_TOLERANCE", 1e-6)
    circuit = circuit_of(kind, n_qubits, n_layers)
    found = expressivity_at(circuit, drawn(circuit, 3).double(), root_of(circuit))
    assert found.rank == n_directions
    assert 1 <= found.effective_rank <= found.rank + 1e-9
    assert 1 <= found.n_for_99_percent <= found.rank


def test_features_of_random_states_spread_as_those_of_random_vectors():
    circuit = circuit_of("ry-cnot-chain", 8, 12)
    found = expressivity_at(circuit, drawn(circuit, 4), root_of(circuit))
    assert found.spread == pytest.approx((1 - 2 / torch.pi) ** 0.5, rel=0.1)


def test_features_that_nothing_moves_have_no_directions():
    circuit = circuit_of("ry-cnot-chain", 3, 2)
    found = expressivity_at(circuit, drawn(circuit, 2), lambda p: torch.zeros_like(p[:, :2]))
    assert found == Expressivity(0, 0, 0, 0)


def test_more_qubits_have_fewer_draws_within_bounds():
    n_draws = [n_draws_for(n_qubits) for n_qubits in range(1, 25)]
    assert n_draws == sorted(n_draws, reverse=True)
    assert (n_draws[0], n_draws[-1]) == (trainability.MAX_DRAWS, trainability.MIN_DRAWS)


# Runs


@pytest.fixture
def few_qubits(monkeypatch) -> None:
    monkeypatch.setattr(report, "QUBITS", range(4, 7))


@pytest.fixture
def plan(cli: Cli, llama: Path, tmp_path: Path):
    def run(*options: str) -> Path:
        code, _, err = cli("plan", "--model", llama, "--out", tmp_path / "run", "--rank", "2", *options)
        assert code == 0, err
        return tmp_path / "run"

    return run


STATE = ("--generator", "state", "--layers", "3")
OTHERS = [
    (*STATE, "--features", "signed"),
    ("--circuits", "2", "--layers", "2"),
    ("--circuits", "2", "--features", "random"),
    ("--generator", "aligned", "--layers", "2", "--ansatz", "efficient-su2"),
]


@pytest.mark.usefixtures("few_qubits")
def test_a_run_shows_gradients_by_layer_and_by_qubits(cli, plan):
    run = plan(*STATE)
    code, out, err = cli("inspect", run, "--gradients")
    assert (code, err) == (0, "")
    assert "mean square gradients of sqrt(p 2^N + 0.01) and of p by layer" in out
    assert "independent directions" in out and "x 4^N" in out
    content = json.loads(cli("inspect", run, "--gradients", "--json")[1])
    found, circuit = content["gradients"], content["circuit"]
    assert len(found["layers"]["start"]["feature"]) == circuit["n_layers"] == 3
    assert found["n_states"] == circuit["n_chunks"]
    assert found["n_angles"] == content["account"]["n_angles"]
    by_qubits = {row["n_qubits"]: row for row in found["qubits"]}
    assert [*by_qubits] == sorted({4, 5, 6, circuit["n_qubits"]})
    assert by_qubits[4]["random"]["probability"] > 8 * by_qubits[6]["random"]["probability"]
    # The start is the uniform state but for some noise, and random states are not.
    assert by_qubits[6]["start"]["feature"] == pytest.approx(0.248, rel=0.1)
    assert found["expressivity"]["start"]["spread"] < 0.1 < found["expressivity"]["random"]["spread"]
    assert found["expressivity"]["start"]["rank"] <= found["n_angles"]


@pytest.mark.usefixtures("few_qubits")
def test_without_the_flag_nothing_is_simulated(cli, plan, monkeypatch):
    monkeypatch.setattr(report, "trainability_of", None)
    run = plan(*STATE)
    assert "gradient" not in cli("inspect", run)[1]
    assert "gradients" not in json.loads(cli("inspect", run, "--json")[1])


@pytest.mark.usefixtures("few_qubits")
@pytest.mark.parametrize("options", OTHERS, ids=["signed", "windows", "random", "uniform"])
def test_circuits_of_every_start_are_shown(cli, plan, options):
    run = plan(*options)
    found = json.loads(cli("inspect", run, "--gradients", "--json")[1])["gradients"]
    for place in ("start", "random"):
        assert 0 < found["expressivity"][place]["rank"] <= min(found["n_angles"], found["n_states"])
        assert all(0 < value < 0.3 for value in found["layers"][place]["feature"])
        assert all(0 < row[place]["feature"] < 0.3 for row in found["qubits"])
    assert cli("inspect", run, "--gradients")[0] == 0


@pytest.mark.usefixtures("few_qubits")
def test_the_same_plan_shows_the_same_numbers_whatever_else_is_drawn(plan):
    layout = RunDirectory(plan(*STATE)).read(WeightLayout)
    first = report.trainability_of(layout)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    try:
        second = report.trainability_of(layout)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert report.trainability_json(first) == report.trainability_json(second)
    other = report.trainability_of(layout.model_copy(update={"seed": 1}))
    assert report.trainability_json(other) != report.trainability_json(first)


@pytest.mark.usefixtures("few_qubits")
def test_the_start_is_that_of_the_run(plan):
    """A start on a window: what is read of the circuit is spread over its window alone."""
    layout = RunDirectory(plan("--circuits", "2", "--layers", "1")).read(WeightLayout)
    assert layout.features.windows.n_window_qubits == 1
    found = report.trainability_of(layout)
    assert found.feature == "sqrt(p 2^N + 0.02)"
    assert found.expressivity["start"].spread == pytest.approx(
        0.45, abs=0.06
    )  # half of them 0, half near 0.9


def test_a_control_has_no_gradients(cli, plan):
    run = plan("--circuits", "2", "--features", "bits")
    code, out, err = cli("inspect", run, "--gradients")
    assert (code, err) == (0, "")
    assert out.endswith("gradients: none, since the run has no circuits\n")
    assert json.loads(cli("inspect", run, "--gradients", "--json")[1])["gradients"] is None


def test_a_run_that_is_not_planned_yet_has_no_gradients(cli, plan, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(plan(*STATE) / AdapterSpec.file_name(), bare)
    assert cli("inspect", bare, "--gradients")[1].endswith("gradients: none, since the run has no circuits\n")


def test_an_adapter_and_an_empty_directory_are_refused_in_one_line(cli, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert cli.refuses("inspect", tmp_path, "--gradients").startswith("error: --gradients: expected a run")
    assert "no such directory" in cli.refuses("inspect", tmp_path / "none", "--gradients")
