"""metrics.jsonl: what its lines say, and that killed and resumed trainings write the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qpa.store.atomic_files import TEMPORARY_PREFIX
from qpa.store.run_directory import METRICS, RunDirectory
from qpa.training.generator_callback import GeneratorCallback
from qpa.training.training_log import TrainingLog, line_of_steps
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

N_STEPS = 23
LOG_STEPS = 10


def lines_of(run: RunDirectory) -> list[str]:
    return (run.path / METRICS).read_text().splitlines()


# Lines


def test_a_line_has_the_means_of_its_steps_but_what_is_of_a_moment_is_the_last_steps() -> None:
    steps = [
        {"loss": 4.0, "entropy": 1.0, "aux_loss": 0.0, "grad_norm": 9.0, "num_tokens": 7, "step": 1},
        {"loss": 2.0, "entropy": 2.0, "aux_loss": 0.5, "grad_norm": 5.0, "num_tokens": 9, "step": 2},
    ]
    assert line_of_steps(steps) == {
        "loss": 3.0,
        "entropy": 1.5,
        "aux_loss": 0.25,
        "grad_norm": 5.0,
        "num_tokens": 9,
        "step": 2,
    }


def test_a_resumed_log_drops_what_will_be_written_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    log = TrainingLog(path)
    for step, metrics in ((0, {"eval_loss": 3.0}), (10, {"loss": 2.0}), (20, {"loss": 1.0})):
        log.write(step, metrics)
    log.write(20, {"eval_loss": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 30, "lo')
    TrainingLog(path, 20)
    assert path.read_bytes() == whole  # an evaluation on the way came before its checkpoint
    TrainingLog(path, 20, is_over=True)
    assert path.read_bytes() == whole[: whole.rindex(b'{"step": 20')]
    TrainingLog(path, 19)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10]
    TrainingLog(path)
    assert path.read_bytes() == b""


def test_a_byte_order_mark_costs_no_line_of_a_resumed_log(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b'\xef\xbb\xbf{"step": 0, "eval_loss": 3.0}\n')
    TrainingLog(path, 5)
    assert path.read_bytes() == b'{"step": 0, "eval_loss": 3.0}\n'


def test_a_line_is_about_all_steps_since_the_line_before(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, float]] = []
    told: list[Any] = []
    on_log = GeneratorCallback.on_log

    def spy(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        reported.append(dict(logs))
        self.progress = lambda *call: told.append(call)
        on_log(self, args, state, control, logs=logs, **rest)

    monkeypatch.setattr(GeneratorCallback, "on_log", spy)
    run = plan(llama, tmp_path / "run")
    train(run, text_file, max_steps=N_STEPS)
    first, *lines, last = [json.loads(line) for line in lines_of(run)]
    assert last.keys() == {"step", "eval_loss", "eval_perplexity"}
    assert first.keys() == last.keys() | {"step_circuits", "step_executions", "step_jobs"}
    assert [line["step"] for line in lines] == [10, 20]
    for number, line in enumerate(lines):
        steps = reported[number * LOG_STEPS : (number + 1) * LOG_STEPS]
        for name in ("loss", "entropy", "mean_token_accuracy"):
            assert line[name] == pytest.approx(sum(step[name] for step in steps) / LOG_STEPS, rel=1e-12)
        for name in ("grad_norm", "learning_rate", "epoch", "num_tokens"):
            assert line[name] == steps[-1][name]
    assert told == [
        ("training", step, N_STEPS, {"loss": logs["loss"], "tokens": logs["num_tokens"]})
        for step, logs in enumerate(reported[:N_STEPS], 1)
    ]


# Kills

KILLED = """
import os, signal, sys
from pathlib import Path

import torch

from qpa.documents import Checkpoint
from qpa.training.generator_callback import GeneratorCallback
from qpa.training.training_log import TrainingLog
from qpa.store.run_directory import RunDirectory
from tests.test_train_generator import train

torch.set_num_threads(1)
n_steps, save_steps = int(sys.argv[3]), int(sys.argv[4])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(moment, at):
    begin, write, to_json = GeneratorCallback.on_step_begin, TrainingLog.write, Checkpoint.to_json

    def on_step_begin(self, args, state, control, **rest):
        die() if state.global_step == at else begin(self, args, state, control, **rest)

    def torn_write(self, step, metrics):
        write(self, step, metrics)
        if step == at and "loss" in metrics:
            os.truncate(self.path, self.path.stat().st_size - 20)
            die()

    def whole_write(self, step, metrics):
        write(self, step, metrics)
        if step == at and ("eval_loss" in metrics) == (moment == "evaluation"):
            die()

    def half_a_checkpoint(self):
        die() if self.step == at else None
        return to_json(self)

    if moment == "step":
        GeneratorCallback.on_step_begin = on_step_begin
    elif moment == "torn line":
        TrainingLog.write = torn_write
    elif moment == "checkpoint":
        Checkpoint.to_json = half_a_checkpoint
    else:
        TrainingLog.write = whole_write


for number, (moment, at) in enumerate(zip(sys.argv[5::2], map(int, sys.argv[6::2]), strict=True)):
    child = os.fork()
    if child == 0:
        set_trap(moment, at)
        options = {"max_steps": n_steps, "save_steps": save_steps, "resume": number > 0}
        train(RunDirectory(Path(sys.argv[1])), Path(sys.argv[2]), **options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, at, status)
"""


@pytest.mark.parametrize(
    ("save_steps", "kills"),
    [
        (4, [("step", 7), ("torn line", 10), ("step", 13), ("line", 20), ("evaluation", N_STEPS)]),
        (5, [("line", 10), ("checkpoint", 15), ("checkpoint", 20), ("step", 22)]),
    ],
)
def test_a_training_that_was_killed_again_and_again_leaves_the_same_lines(
    llama: Path, text_file: Path, tmp_path: Path, save_steps: int, kills: list[tuple[str, int]]
) -> None:
    whole, killed = plan(llama, tmp_path / "whole"), plan(llama, tmp_path / "killed")
    train(whole, text_file, max_steps=N_STEPS, save_steps=save_steps)
    kill_words = [str(word) for kill in kills for word in kill]
    arguments = [str(killed.path), str(text_file), str(N_STEPS), str(save_steps), *kill_words]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train(killed, text_file, max_steps=N_STEPS, save_steps=save_steps, resume=True)
    assert lines_of(killed) == lines_of(whole)
    assert (killed.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()
    assert same_bits(tensors(killed), tensors(whole))
    assert not list(killed.path.rglob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize(
    ("base", "inspect", "options"),
    [
        ("gpt2", {}, {"grad_accum": 3, "batch_size": 4}),
        ("llama", {"method": "prefix", "rank": 2}, {}),
        ("llama", {"targets": ("lm_head",)}, {"bf16": True}),
    ],
    ids=["dropout and accumulation", "prefix", "head in bfloat16"],
)
@pytest.mark.parametrize("step", [3, 10, 19])
def test_what_is_resumed_at_any_step_leaves_the_same_lines(
    request: pytest.FixtureRequest,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    inspect: dict[str, Any],
    options: dict[str, Any],
    step: int,
) -> None:
    """Other trainers, and epochs that end within a line."""
    model = request.getfixturevalue(base)
    layout = {"circuits": None, "layers": None} if inspect else {}
    options = {"max_steps": 20, "save_steps": 3, **options}
    whole = plan(model, tmp_path / "whole", inspect=inspect, **layout)
    train(whole, text_file, **options)
    halved = plan(model, tmp_path / "halved", inspect=inspect, **layout)
    with monkeypatch.context() as patch:
        interrupt_after(patch, step - 1)
        with pytest.raises(KeyboardInterrupt):
            train(halved, text_file, **options)
    train(halved, text_file, **options, resume=True)
    assert lines_of(halved) == lines_of(whole)
    assert len(lines_of(whole)) == 4
