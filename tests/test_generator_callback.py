"""What happens around the steps: evaluations, the best checkpoint, early stopping, all of them resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qpa.documents import FrozenAdapter, TrainingResult
from qpa.errors import CheckpointError, DivergedError, OptionError
from qpa.store.run_directory import METRICS, RunDirectory
from qpa.training import session as module
from qpa.training.generator_callback import is_patience_over
from qpa.training.training_options import TrainingOptions
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

TOO_FAST = {"lr": 1.2, "schedule": "constant", "warmup": 0.0, "max_steps": 12, "save_steps": 5}
"""The loss of the tiny Llama falls, and rises again."""


def lines_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]


def evaluations(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in lines_of(run) if "eval_loss" in line}


def result(run: RunDirectory) -> TrainingResult:
    return run.read(FrozenAdapter).result


@pytest.fixture(scope="module")
def watched(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = plan(llama, tmp_path_factory.mktemp("watched") / "run")
    train(run, text_file, **TOO_FAST, eval_steps=2, keep_best=True)
    return run


def test_evaluations_change_nothing_but_the_lines(llama: Path, text_file: Path, tmp_path: Path) -> None:
    plain, watched = plan(llama, tmp_path / "plain"), plan(llama, tmp_path / "watched")
    train(plain, text_file)
    train(watched, text_file, eval_steps=2)
    assert same_bits(tensors(plain), tensors(watched))
    assert list(evaluations(watched)) == [0, 2, 4, 6]
    assert evaluations(watched)[6] == evaluations(plain)[6]
    assert [line for line in lines_of(watched) if line["step"] in (0, 6)] == lines_of(plain)


def test_the_best_evaluation_is_frozen_and_named(watched: RunDirectory) -> None:
    found = evaluations(watched)
    best = min((step for step in found if 0 < step < 12), key=found.__getitem__)
    assert 2 <= best < 12
    assert (result(watched).frozen_step, result(watched).n_steps) == (best, 12)
    assert result(watched).eval_loss == found[best] == found[12]
    assert lines_of(watched)[-1]["frozen_step"] == best


def test_the_best_checkpoint_stays_besides_the_newest(watched: RunDirectory) -> None:
    names = sorted(path.name for path in (watched.path / "checkpoints").iterdir())
    best = f"step-{result(watched).frozen_step:08d}"
    assert best in names
    newest = [name for name in names if name != best]
    assert newest == ["step-00000010"] or newest == ["step-00000005", "step-00000010"]


def test_the_last_step_is_frozen_where_it_is_the_best(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    train(run, text_file, eval_steps=2, keep_best=True)
    assert result(run).frozen_step == result(run).n_steps == 6
    assert result(run).eval_loss == min(evaluations(run).values())


def test_a_training_that_gets_no_better_stops_early_and_freezes_the_best(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = plan(llama, tmp_path / "run")
    train(run, text_file, **TOO_FAST, eval_steps=2, early_stopping=1)
    found = result(run)
    assert found.n_steps == found.frozen_step + 2 < 12
    assert found.eval_loss == min(evaluations(run).values())
    assert lines_of(run)[-1]["step"] == found.n_steps


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"keep_best": True}, [3, 9, 11]),
        ({"early_stopping": 1}, [5, 9]),
        ({"early_stopping": 1, "save_steps": 1}, [9]),
    ],
    ids=["best", "early stopping", "a checkpoint at the stop"],
)
def test_what_is_interrupted_anywhere_is_resumed_to_the_same_bits_and_lines(
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    stops: list[int],
) -> None:
    options = {**TOO_FAST, "save_steps": 2, "eval_steps": 2, "keep_checkpoints": 1, "log_steps": 3, **options}
    whole, halved = plan(llama, tmp_path / "whole"), plan(llama, tmp_path / "halved")
    train(whole, text_file, **options)
    for number, step in enumerate(stops):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step - 1)
            with pytest.raises(KeyboardInterrupt):
                train(halved, text_file, **options, resume=number > 0)
    train(halved, text_file, **options, resume=True)
    assert (halved.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()
    assert halved.read(FrozenAdapter) == whole.read(FrozenAdapter)
    train(halved, text_file, **options, resume=True)  # and once more, where nothing is left to do
    assert (halved.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()
    assert halved.read(FrozenAdapter) == whole.read(FrozenAdapter)


def test_a_kill_between_the_last_step_and_the_documents_is_made_good(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TOO_FAST, "max_steps": 10, "eval_steps": 2, "keep_best": True}
    whole, cut = plan(llama, tmp_path / "whole"), plan(llama, tmp_path / "cut")
    train(whole, text_file, **options)
    with monkeypatch.context() as patch:
        patch.setattr(module, "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(cut, text_file, **options)
    train(cut, text_file, **options, resume=True)
    assert cut.read(FrozenAdapter) == whole.read(FrozenAdapter)
    assert (cut.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()


def test_a_best_checkpoint_that_is_gone_is_an_error(
    watched: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(watched.path, tmp_path / "copy")
    run = RunDirectory(tmp_path / "copy")
    shutil.rmtree(run.path / "checkpoints" / f"step-{result(run).frozen_step:08d}")
    options = {**TOO_FAST, "eval_steps": 2, "keep_best": True, "resume": True}
    with pytest.raises(CheckpointError, match="train again"):
        train(run, text_file, **options)


@pytest.mark.parametrize(
    ("step", "best_step", "is_over"), [(4, None, False), (4, 0, False), (8, 4, False), (10, 4, True)]
)
def test_patience_counts_evaluations(step: int, best_step: int | None, is_over: bool) -> None:
    options = TrainingOptions(data="x", eval_steps=2, early_stopping=3)
    assert is_patience_over(options, step, best_step) is is_over
    assert not is_patience_over(TrainingOptions(data="x", eval_steps=2), step, best_step)


@pytest.mark.parametrize("n_kept", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(
    llama: Path, text_file: Path, tmp_path: Path, n_kept: int
) -> None:
    run = plan(llama, tmp_path / "run")
    train(run, text_file, max_steps=5, save_steps=1, keep_checkpoints=n_kept)
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in range(6 - n_kept, 6)]


def test_lines_are_as_many_as_asked_for(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    train(run, text_file, log_steps=2)
    assert [line["step"] for line in lines_of(run) if "loss" in line] == [2, 4, 6]


@pytest.mark.parametrize("option", ["keep_best", "early_stopping"])
def test_what_needs_evaluations_says_so(llama: Path, text_file: Path, tmp_path: Path, option: str) -> None:
    run = plan(llama, tmp_path / "run")
    with pytest.raises(OptionError, match=f"^{option}: .*say how often: `eval_steps`"):
        train(run, text_file, **{option: 2 if option == "early_stopping" else True})


def test_a_loss_that_is_not_finite_stops_where_a_scaler_would_skip_the_step(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in float16: the optimizer never sees the gradient, since the scaler leaves the step out."""
    from qpa.training.objectives.sft import SFTTrainer
    from qpa.training.optimizer import GeneratedAdapterOptimizer

    original, step = SFTTrainer.compute_loss, GeneratedAdapterOptimizer.step

    def poisoned(self: Any, model: Any, *rest: Any, **options: Any) -> Any:
        loss = original(self, model, *rest, **options)
        return loss * float("nan") if self.state.global_step == 4 else loss

    def skipping(self: Any, closure: Any = None) -> Any:
        finite = all(bool(torch.isfinite(p.grad).all()) for p in self._adapter if p.grad is not None)
        return step(self, closure) if finite else None

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)
    monkeypatch.setattr(GeneratedAdapterOptimizer, "step", skipping)
    run = plan(llama, tmp_path / "run")
    with pytest.raises(DivergedError, match=r"^step 5: expected a finite loss.*is .*step-00000003$"):
        train(run, text_file)


# Schedules, clipping, precision


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_rates_follow_the_schedule(
    llama: Path, text_file: Path, tmp_path: Path, schedule: str, expected: list[float]
) -> None:
    run = plan(llama, tmp_path / "run")
    train(run, text_file, lr=1e-3, schedule=schedule, warmup=2, log_steps=1)
    rates = [line["learning_rate"] / 1e-3 for line in lines_of(run) if "loss" in line]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_weight_decay_changes_what_is_trained(llama: Path, text_file: Path, tmp_path: Path) -> None:
    runs = [plan(llama, tmp_path / str(decay)) for decay in (0.0, 0.5)]
    for run, decay in zip(runs, (0.0, 0.5), strict=True):
        train(run, text_file, weight_decay=decay)
    assert not same_bits(tensors(runs[0]), tensors(runs[1]))


def test_recomputing_activations_gives_the_same_bits(gpt2: Path, text_file: Path, tmp_path: Path) -> None:
    """GPT-2 has dropout, which must be drawn alike twice."""
    plain, recomputed = plan(gpt2, tmp_path / "plain"), plan(gpt2, tmp_path / "recomputed")
    train(plain, text_file)
    train(recomputed, text_file, gradient_checkpointing=True)
    assert same_bits(tensors(plain), tensors(recomputed))


def test_float16_is_refused_where_it_cannot_work(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    with pytest.raises(OptionError, match="fp16: expected a CUDA device, found `device` cpu; use `bf16`"):
        train(run, text_file, fp16=True)
    with pytest.raises(OptionError, match="fp16: expected one of `bf16` and `fp16`, found both"):
        train(run, text_file, fp16=True, bf16=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_float16_on_cuda_learns_and_resumes_to_the_same_bits(
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_grad_norm: float | None,
) -> None:
    options = {
        "fp16": True,
        "device": "cuda",
        "grad_accum": 2,
        "max_grad_norm": max_grad_norm,
        "max_steps": 12,
    }
    whole, halved = plan(llama, tmp_path / "whole"), plan(llama, tmp_path / "halved")
    train(whole, text_file, **options)
    assert result(whole).eval_loss < result(whole).base_loss
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(halved, text_file, **options)
    monkeypatch.undo()
    train(halved, text_file, **options, resume=True)
    assert same_bits(tensors(whole), tensors(halved))
