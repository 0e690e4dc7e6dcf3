"""qpa plan --select: which candidates are measured, which are shown, and which one is chosen."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qiskit import QuantumCircuit

from qpa.circuits import selection as selection_module
from qpa.circuits.circuit import load_circuit
from qpa.circuits.mitigation.mitigation import calibrate, corrected, parse_mitigations
from qpa.circuits.selection import (
    LAYOUTS,
    LEVELS,
    MITIGATIONS_TRIED,
    SHOTS,
    TOLERANCE,
    Costs,
    choose,
    non_dominated,
    thinned,
)
from qpa.circuits.sources.noisy import NoisySimulator
from qpa.circuits.sources.source import SourceSettings
from qpa.circuits.targets import RESET_S
from qpa.cli.main import main
from qpa.documents import NativeCircuit, Selection
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import RunDirectory
from tests.command_line import Cli

PLAN = (
    *("--generator", "aligned", "--rank", "2", "--circuits", "3", "--layers", "2"),
    *("--targets", "q_proj,v_proj", "--seed", "7"),
)
BELEM = ("--device-target", "fake_belem", "--select")
FILE = "selection.json"


@pytest.fixture(scope="module")
def selected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of four qubits that was planned with a selection."""
    out = tmp_path_factory.mktemp("selected") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qpa", "plan", "--model", str(llama), *PLAN, *BELEM, "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
    return out


def files_of(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}


def selection_of(run: Path) -> Selection:
    return Selection.from_json((run / FILE).read_bytes(), FILE)


# Which candidates are of interest

COSTS = st.builds(Costs, st.integers(0, 4).map(float), st.integers(1, 4), st.integers(1, 4).map(float))


@given(st.lists(COSTS, min_size=1, max_size=12))
def test_a_candidate_is_of_interest_if_and_only_if_none_beats_it(costs):
    def beats(one, other):
        pairs = list(zip(one, other, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    best = non_dominated(costs)
    assert best == [
        not any(beats(other, one) for other in costs) and one not in costs[:place]
        for place, one in enumerate(costs)
    ]
    front = [one for one, is_best in zip(costs, best, strict=True) if is_best]
    assert front
    assert all(
        is_best or any(beats(b, one) or b == one for b in front)
        for one, is_best in zip(costs, best, strict=True)
    )


@given(st.lists(COSTS, min_size=1, max_size=12))
def test_chosen_is_the_cheapest_of_those_near_the_smallest_error(costs):
    chosen, why = choose(costs)
    smallest = min(one.error for one in costs)
    near = [one for one in costs if one.error <= (1 + TOLERANCE) * smallest]
    assert costs[chosen] in near
    assert costs[chosen].n_executions == min(one.n_executions for one in near)
    assert non_dominated(costs)[chosen]
    assert f"{len(near)} of {len(costs)} candidates" in why and f"{smallest:.4f}" in why


def test_a_larger_error_within_the_tolerance_is_taken_for_fewer_executions():
    costs = [Costs(0.1, 900, 9.0), Costs(0.109, 300, 3.0), Costs(0.108, 300, 4.0), Costs(0.112, 100, 1.0)]
    assert choose(costs)[0] == 2


def test_thinned_counts_are_part_of_the_counts_and_distributed_likewise():
    counts = {"a": torch.tensor([[600, 0, 300, 100], [1, 999, 0, 0]]), "b": torch.tensor([[0, 1000, 0, 0]])}
    random = np.random.default_rng(1)
    draws = [thinned(counts, 100, random) for _ in range(400)]
    for name, whole in counts.items():
        for draw in draws:
            assert (draw[name].sum(1) == 100).all() and (draw[name] <= whole).all()
        mean = torch.stack([draw[name] for draw in draws]).double().mean(0)
        torch.testing.assert_close(mean, whole.double() / 10, atol=1.0, rtol=0)
    assert all(torch.equal(whole, thinned(counts, 1000, random)[name]) for name, whole in counts.items())


# The document


def test_every_distinct_circuit_is_a_candidate_with_every_mitigation_and_number_of_shots(selected):
    selection = selection_of(selected)
    settings = [(one.optimization_level, one.layouts) for one in selection.circuits]
    assert settings == [(level, layouts) for level in LEVELS for layouts in LAYOUTS]
    digests = [one.sha256 for one in selection.circuits]
    tried = [(one.circuit, one.shots, one.mitigation) for one in selection.candidates]
    firsts = sorted({digests.index(digest) for digest in digests})
    assert len(firsts) < len(digests)
    assert tried == [(c, shots, name) for c in firsts for shots in SHOTS for name in MITIGATIONS_TRIED]
    costs = [Costs(one.error, one.n_executions, one.time_s) for one in selection.candidates]
    assert [one.is_non_dominated for one in selection.candidates] == non_dominated(costs)
    assert (selection.chosen, selection.why) == choose(costs)
    assert (selection.target, selection.n_circuits, selection.tolerance) == ("fake_belem", 3, TOLERANCE)
    assert len({selection.angle_seed, selection.sampling_seed, selection.thinning_seed}) == 3


def test_executions_and_time_are_those_of_a_forward_pass(selected):
    selection = selection_of(selected)
    besides = {"none": 0, "readout": 2, "depolarizing": 1, "readout+depolarizing": 3}
    for one in selection.candidates:
        assert one.n_executions == (3 + besides[one.mitigation]) * one.shots
        run_s = selection.circuits[one.circuit].duration_s + RESET_S
        assert one.time_s == pytest.approx(one.n_executions * run_s)


def test_the_run_is_transpiled_as_was_chosen_and_says_for_what_it_was_tried(selected):
    run, selection = RunDirectory.open(selected), selection_of(selected)
    native = run.read(NativeCircuit)
    options = {option.name: option.value for option in native.provenance.options}
    chosen = selection.chosen_circuit
    assert (options["optimization_level"], options["layouts"]) == (chosen.optimization_level, chosen.layouts)
    assert native.qpy.sha256 == chosen.sha256
    assert native.transpiler_seed == chosen.transpiler_seed
    assert selection.device.sha256 == native.device.sha256
    assert run.files.get(selection.device).is_file()
    made = selection.provenance
    assert (made.pass_name, made.seed, made.parents) == ("select-strategy", 7, native.provenance.parents)
    assert {option.name for option in made.options} == {"target", "keep_last_layer"}


def test_an_error_is_that_of_counts_that_are_sampled_anew(selected):
    """Other angles, other counts, and shots that are sampled and not drawn from more of them."""
    run, selection = RunDirectory.open(selected), selection_of(selected)
    context = PassContext(0, run.files, run.read_through(NativeCircuit))
    circuit = load_circuit(context, native=True)
    angles = (2 * torch.rand(12, circuit.n_angles, generator=torch.Generator().manual_seed(3)) - 1) * torch.pi
    of_chosen = selection.chosen_strategy.circuit
    for one in (one for one in selection.candidates if one.circuit == of_chosen and one.shots == 1024):
        source, tools = NoisySimulator(SourceSettings(5, one.shots)), parse_mitigations(one.mitigation)
        counts, besides = source.counts(circuit, angles), calibrate(tools, source, circuit, angles)
        found = corrected(tools, counts, circuit, besides) - circuit.exact_probabilities(angles)
        assert float(0.5 * found.abs().sum(1).mean()) == pytest.approx(one.error, rel=0.5)
    errors = {(one.mitigation, one.shots): one.error for one in selection.candidates}
    assert errors["depolarizing", 65536] < 0.7 * errors["none", 65536]
    assert errors["none", 65536] < errors["none", 1024]


# The commands


def test_the_same_command_leaves_the_same_bytes(
    cli: Cli, llama: Path, selected: Path, tmp_path: Path
) -> None:
    code, out, err = cli("plan", "--model", llama, *PLAN, *BELEM, "--out", tmp_path / "run")
    assert code == 0, err
    before = files_of(selected)
    assert files_of(tmp_path / "run") == before
    chosen = selection_of(selected).chosen_strategy
    shown = next(line for line in out.splitlines() if line.lstrip().startswith("* "))
    assert shown.split()[3:5] == [chosen.mitigation, f"{chosen.shots:,}"]
    assert f"--mitigation {chosen.mitigation} --shots {chosen.shots}" in out


def test_a_selection_goes_when_the_circuit_is_transpiled_otherwise(
    cli: Cli, llama: Path, selected: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(selected, run)
    cli.refuses("transpile", run, "--device-target", "generic:2")
    assert (run / FILE).is_file()
    assert cli("transpile", run, "--device-target", "fake_belem")[0] == 0
    assert not (run / FILE).exists() and not list(run.glob("[0-9a-f]*.device"))
    shutil.copy(selected / FILE, run)
    assert cli("plan", "--model", llama, *PLAN, "--out", run, "--force")[0] == 0  # it is a run's own file
    assert not (run / FILE).exists()


def test_selecting_wants_a_device_and_circuits(cli: Cli, llama: Path, selected: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = cli.refuses("plan", "--model", llama, *PLAN, "--select", "--out", out)
    assert line == "error: --device-target: expected a device, for --select, found none; name one\n"
    control = ("plan", "--model", llama, *PLAN, "--features", "classical", "--out")
    assert cli.refuses(*control, out, *BELEM).startswith("error: --device-target: expected none, since")
    assert cli(*control, tmp_path / "control")[0] == 0
    line = cli.refuses("transpile", tmp_path / "control", *BELEM)
    assert line.startswith("error: --select: expected a plan with circuits")
    unknown = ("--device-target", "fake_belen", "--select")
    assert "no such target; nearest: fake_belem" in cli.refuses("transpile", selected, *unknown)
    assert not out.exists()


@pytest.mark.parametrize(("at_most", "n_used"), [(3, 4), (4, 5)])
def test_too_many_qubits_to_simulate_are_refused(
    cli: Cli, selected: Path, monkeypatch: pytest.MonkeyPatch, at_most: int, n_used: int
) -> None:
    """Those of the logical circuit, or those that it uses on the device however it is transpiled."""
    before = files_of(selected)
    monkeypatch.setattr(selection_module, "MAX_DENSITY_QUBITS", at_most)
    monkeypatch.setattr(selection_module, "restrict", lambda *_: (QuantumCircuit(n_used), None))
    assert cli.refuses("transpile", selected, *BELEM) == (
        f"error: --select: expected at most {at_most} qubits, whose noise is simulated, found {n_used}; "
        "leave it out, and choose with --optimization-level and --layouts\n"
    )
    assert files_of(selected) == before


def test_a_circuit_that_uses_too_many_qubits_is_no_candidate_of_a_run_that_is_transpiled(
    cli: Cli, selected: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(selected, run)
    n_used = iter([13] * len(LAYOUTS) + [4] * len(LAYOUTS) * (len(LEVELS) - 1))
    monkeypatch.setattr(selection_module, "restrict", lambda *_: (QuantumCircuit(next(n_used)), None))
    monkeypatch.setattr(selection_module, "SHOTS", (64, 256))
    code, out, _ = cli("transpile", run, *BELEM, "--json")
    selection, content = selection_of(run), json.loads(out)["selection"]
    assert code == 0
    assert [one.n_used_qubits for one in selection.circuits] == [13, 13, *[4] * 6]
    assert min(one.circuit for one in selection.candidates) >= len(LAYOUTS)
    assert content["chosen"] in content["non_dominated"]
    assert (content["why"], content["digest"]) == (selection.why, selection.digest)
    assert content["chosen"]["error"] == selection.chosen_strategy.error
    assert RunDirectory.open(run).read(NativeCircuit).qpy.sha256 == selection.chosen_circuit.sha256
