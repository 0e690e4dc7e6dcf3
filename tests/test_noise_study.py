"""The study of `qpa noise`, and trainings whose device fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qiskit.primitives import BaseSamplerV2
from qiskit_aer.primitives import SamplerV2

from qpa.bench.noise_study import read_lines, table_rows
from qpa.circuits.sources import backend as backend_module
from qpa.documents import FrozenAdapter, Measurement, NativeCircuit, TrainedGenerator
from qpa.store.run_directory import RunDirectory
from tests.command_line import Cli

TRAIN = ("--max-steps", "4", "--max-length", "32", "--batch-size", "2", "--device", "cpu")


def ok(cli: Cli, *arguments: str | Path) -> str:
    code, out, err = cli(*arguments)
    assert code == 0, err
    return out


@pytest.fixture
def planned(cli: Cli, llama: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    circuit = ("--rank", "2", "--generator", "state", "--layers", "1", "--device-target", "fake_torino")
    ok(cli, "plan", "--model", llama, *circuit, "--out", run)
    return run


def test_a_study_goes_on_where_it_stopped_and_leaves_the_run_alone(
    cli: Cli, planned: Path, text_file: Path, tmp_path: Path
) -> None:
    ok(cli, "train", planned, "--data", text_file, *TRAIN)
    before = {file.name: file.read_bytes() for file in planned.iterdir() if file.is_file()}
    out = tmp_path / "noise"
    study = ("--data", text_file, "--targets", "none,ions:8", "--mitigation", "none,readout", "--out", out)
    ok(cli, "noise", planned, *study, "--shots", "100", "--seeds", "1")
    first = read_lines(out)
    assert [(x["target"], x["mitigation"]) for x in first] == [
        ("none", "none"),
        ("ions:8", "none"),
        ("ions:8", "readout"),
    ]
    shown = ok(cli, "noise", planned, *study, "--shots", "100,20000", "--seeds", "1")
    assert read_lines(out)[:3] == first and len(read_lines(out)) == 6
    assert "20,000" in shown and (out / "noise.png").is_file()
    errors = {(x["target"], x["mitigation"], x["shots"]): x["weight_error"] for x in read_lines(out)}
    assert errors["none", "none", 20000] < errors["none", "none", 100] / 4
    assert all(x["n_executions"] == x["shots"] * (3 if x["mitigation"] == "readout" else 1) for x in first)
    assert {file.name: file.read_bytes() for file in planned.iterdir() if file.is_file()} == before
    assert len(table_rows(read_lines(out))) == 6


def test_what_cannot_be_studied_is_refused(cli: Cli, planned: Path, text_file: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "noise")
    assert "trained-generator.json" in cli.refuses("noise", planned, *out)
    ok(cli, "train", planned, "--data", text_file, *TRAIN)
    assert "--shots: expected whole numbers of at least 1" in cli.refuses(
        "noise", planned, *out, "--shots", "5,x"
    )
    assert "no such target" in cli.refuses("noise", planned, *out, "--targets", "fake_nothing")
    assert "--mitigation: expected" in cli.refuses("noise", planned, *out, "--mitigation", "hope")
    assert not (tmp_path / "noise").exists()


def test_a_study_of_another_run_in_the_same_directory_is_told_apart(
    cli: Cli, planned: Path, text_file: Path, tmp_path: Path
) -> None:
    out = ("--targets", "none", "--shots", "100", "--seeds", "1", "--out", tmp_path / "noise")
    ok(cli, "train", planned, "--data", text_file, *TRAIN)
    ok(cli, "noise", planned, *out)
    ok(cli, "train", planned, "--data", text_file, *TRAIN, "--force", "--seed", "5")
    shown = json.loads(ok(cli, "noise", planned, *out, "--json"))["cells"]
    assert len(shown) == 1 and len(read_lines(tmp_path / "noise")) == 2
    # A line that was cut short is measured again, and with data what was not scored is.
    results = tmp_path / "noise" / "results.jsonl"
    results.write_text(results.read_text()[:-20])
    scored = json.loads(ok(cli, "noise", planned, *out, "--data", text_file, "--json"))["cells"]
    assert len(scored) == 1 and scored[0]["loss"] is not None


def test_options_are_checked_before_anything_is_trained_or_transpiled(
    cli: Cli, planned: Path, text_file: Path
) -> None:
    native = (planned / "native-circuit.json").read_bytes()
    train = ("train", planned, "--data", text_file, *TRAIN, "--device-target", "ions:9")
    wrong = ("--source", "shots", "--mitigation", "hope")
    assert "--mitigation: expected" in cli.refuses(*train, *wrong)
    assert "none for the source exact" in cli.refuses(*train, "--mitigation", "depolarizing")
    assert (planned / "native-circuit.json").read_bytes() == native
    ok(cli, "train", planned, "--data", text_file, *TRAIN, "--source", "noisy", "--shots", "100")
    ok(cli, "freeze", planned, "--source", "noisy", "--optimization-level", "1", "--shots", "100")
    directory = RunDirectory(planned)
    assert directory.read(NativeCircuit).target == "fake_torino"
    circuit = directory.read(Measurement).circuit
    assert circuit is not None
    (planned / circuit.file).unlink()
    assert circuit.file in cli.refuses("verify", planned)


def test_a_training_goes_on_with_the_circuit_it_began_with(
    cli: Cli, planned: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Failing()
    monkeypatch.setattr(backend_module, "find_backend", lambda name: device)
    monkeypatch.setattr(backend_module, "FIRST_PAUSE_S", 0.0)
    backend = ("--source", "backend", "--backend", "a:b", "--shots", "200", "--save-steps", "1")
    train = ("train", planned, "--data", text_file, *TRAIN, *backend)
    assert "go on with --resume" in cli(*train)[2]
    device.n_left = 100
    assert "checkpoint" in cli(*train, "--resume", "--device-target", "ions:9")[2]


def test_a_device_that_fails_after_the_training_leads_to_freeze(
    cli: Cli, planned: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Failing()
    device.n_left = 5  # the start and four steps
    monkeypatch.setattr(backend_module, "find_backend", lambda name: device)
    monkeypatch.setattr(backend_module, "FIRST_PAUSE_S", 0.0)
    backend = ("--source", "backend", "--backend", "a:b", "--shots", "200")
    _, _, err = cli("train", planned, "--data", text_file, *TRAIN, *backend)
    assert f"the training is done: go on with qpa freeze {planned}" in err
    assert f"qpa freeze {planned}" in cli.refuses("train", planned, "--data", text_file, *TRAIN)
    # A training that has not begun leaves nothing to freeze, though the one before did.
    device.n_left = 0
    assert "freeze" not in cli("train", planned, "--data", text_file, *TRAIN, *backend, "--force")[2]
    device.n_left = 100
    ok(cli, "freeze", planned)
    assert RunDirectory(planned).read(FrozenAdapter).source == "backend"


class Failing(BaseSamplerV2):
    """A device without noise that is gone after some jobs."""

    def __init__(self) -> None:
        self.n_left = 3

    def run(self, pubs: Any, *, shots: int | None = None) -> Any:
        if self.n_left == 0:
            raise TimeoutError("the job was cancelled")
        self.n_left -= 1
        return SamplerV2(seed=1).run(pubs, shots=shots)


def test_a_device_that_fails_in_mid_training_leaves_a_checkpoint_to_go_on_from(
    cli: Cli, planned: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Failing()
    monkeypatch.setattr(backend_module, "find_backend", lambda name: device)
    monkeypatch.setattr(backend_module, "FIRST_PAUSE_S", 0.0)
    backend = ("--source", "backend", "--backend", "a:b", "--shots", "200", "--save-steps", "1")
    # Its jobs are many qubits wide, of which Aer simulates those that are used.
    code, _, err = cli("train", planned, "--data", text_file, *TRAIN, *backend)
    assert code == 1
    assert "backend a:b: expected a job that ends, in 3 tries, found the job was cancelled" in err
    assert "the last good checkpoint is" in err and "go on with --resume" in err
    assert not RunDirectory(planned).has(TrainedGenerator)
    device.n_left = 100
    ok(cli, "train", planned, "--data", text_file, *TRAIN, *backend, "--resume")
    lines = [json.loads(line) for line in (planned / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    frozen = RunDirectory(planned).read(FrozenAdapter)
    assert (frozen.source, frozen.shots) == ("backend", 200)
