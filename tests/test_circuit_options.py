"""Options about circuits and devices where a plan has no circuit that is measured: refused, not ignored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.command_line import Cli

TRAIN = ("--max-steps", "1", "--max-length", "32", "--batch-size", "2", "--device", "cpu")
WORDS = "expected none, since no circuit of the plan is measured, found "
WITHOUT_CIRCUITS = {
    "control": ("--generator", "state", "--features", "log-linear"),
    "tables": ("--features", "classical"),
    "direct": ("--generator", "direct", "--rank", "2"),
    "mpo": ("--generator", "mpo", "--rank", "2"),
    "amplitudes": ("--generator", "quantum-peft", "--rank", "2"),
}


@pytest.fixture(scope="module")
def config_alone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of which there is the config alone: it can be planned for, and not be loaded."""
    path = tmp_path_factory.mktemp("config-alone")
    shutil.copy(llama / "config.json", path)
    return path


def contents(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.iterdir() if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize("plan", WITHOUT_CIRCUITS.values(), ids=WITHOUT_CIRCUITS)
def test_a_plan_without_circuits_is_for_no_device(
    cli: Cli, config_alone: Path, tmp_path: Path, plan: tuple[str, ...]
) -> None:
    command = ("plan", "--model", config_alone, *plan, "--out", tmp_path / "run")
    asked = cli.refuses(*command, "--device-target", "generic:9")
    assert asked == f"error: --device-target: {WORDS}generic:9; leave it out\n"
    assert not (tmp_path / "run").exists()
    assert cli(*command)[0] == 0


def test_nothing_is_loaded_or_written_where_nothing_would_be_run(
    cli: Cli, config_alone: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli("plan", "--model", config_alone, *WITHOUT_CIRCUITS["direct"], "--out", run)[0] == 0
    before = contents(run)
    asked = cli.refuses("transpile", run, "--device-target", "generic:9")
    assert asked.startswith(f"error: --device-target: {WORDS}generic:9")
    train = ("train", run, "--data", text_file, *TRAIN)
    for option, value in (
        ("--source", "shots"),
        ("--source", "noisy"),
        ("--gradient", "spsa"),
        ("--device-target", "generic:9"),
        ("--layouts", "2"),
    ):
        assert cli.refuses(*train, option, value).startswith(f"error: {option}: {WORDS}{value}")
    assert "--shots: expected none, since" in cli.refuses(*train, "--shots", "100")
    assert contents(run) == before and not (run / "metrics.jsonl").exists()


def test_what_is_frozen_of_a_control_takes_no_source_but_the_exact_one(
    cli: Cli, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli("plan", "--model", llama, *WITHOUT_CIRCUITS["control"], "--out", run)[0] == 0
    assert cli("train", run, "--data", text_file, *TRAIN)[0] == 0
    before = contents(run)
    for options, first in (
        (("--source", "shots"), "--source"),
        (("--source", "shots", "--shots", "500", "--mitigation", "depolarizing"), "--shots"),
        (("--source", "noisy", "--device-target", "generic:9"), "--source"),
        (("--backend", "fake_torino"), "--backend"),
        (("--yes",), "--yes"),
    ):
        asked = cli.refuses("freeze", run, *options)
        assert WORDS in asked and asked.startswith(f"error: {first}: "), asked
    assert contents(run) == before
    assert cli("freeze", run, "--source", "exact")[0] == 0


def test_a_configuration_is_refused_at_the_line_of_the_option(
    cli: Cli, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    top = f"model: {llama}\ndata: {text_file}\nout: {run}\n"
    file.write_text(f"{top}plan:\n  generator: direct\n  rank: 2\n  device_target: generic:9\n")
    code, _, err = cli("run", file)
    assert code == 1
    assert err == f"error: {file}, line 7, plan.device_target: {WORDS}generic:9; leave it out\n"
    plan = "plan:\n  generator: direct\n  rank: 2\n"
    file.write_text(f"{top}{plan}train:\n  max_steps: 1\nfreeze:\n  shots: 9\n")
    code, _, err = cli("run", file)
    assert (code, err) == (1, f"error: {file}, line 10, freeze.shots: {WORDS}9; leave it out\n")
    assert not (run / "trained-generator.json").exists()


def test_noise_wants_a_device_before_the_model_is_loaded(
    cli: Cli, config_alone: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    plan = ("--generator", "state", "--layers", "1", "--rank", "2")
    assert cli("plan", "--model", config_alone, *plan, "--out", run)[0] == 0
    asked = cli.refuses("train", run, "--data", text_file, *TRAIN, "--source", "noisy")
    assert asked.startswith("error: --source: expected a run that is planned for a device, for noisy")
