"""Trackers get the lines of metrics.jsonl, under the names that transformers gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qpa.errors import OptionError
from qpa.store.run_directory import METRICS, TENSORBOARD, RunDirectory
from qpa.training.trackers import check_trackers
from tests.test_train_generator import plan, train


def scalars(run: RunDirectory) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / TENSORBOARD)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_losses_and_rates_arrive_in_tensorboard(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    train(run, text_file, report_to=("tensorboard",), log_steps=2, eval_steps=3)
    found = scalars(run)
    lines = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]
    for name, tag in (
        ("loss", "train/loss"),
        ("learning_rate", "train/learning_rate"),
        ("angle_learning_rate", "train/angle_learning_rate"),
        ("eval_loss", "eval/loss"),
    ):
        written = {line["step"]: line[name] for line in lines if name in line}
        assert found[tag] == pytest.approx(written, rel=1e-6)
    assert set(found["eval/loss"]) == {0, 3, 6}
    assert set(found["train/loss"]) == {2, 4, 6}


def test_a_tracker_that_is_not_there_is_named_before_anything_is_loaded(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpa.training.trackers.importlib.util.find_spec", lambda name: None)
    run = plan(llama, tmp_path / "run")
    with pytest.raises(
        OptionError, match="report_to: expected the package wandb, for wandb, found none; pip"
    ):
        train(run, text_file, report_to=("wandb",))
    with pytest.raises(OptionError, match="expected tensorboard, wandb or trackio, found tensorbord"):
        check_trackers(["tensorbord"])
