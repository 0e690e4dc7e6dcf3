"""What qpa does around the steps of a trainer, whatever it trains for.

The trainer is used as it is. qpa's own work is done in a callback, which gives every step its seed, writes
checkpoints without pickle and metrics, evaluates, and reports progress.

After a step, in this order: the line of metrics.jsonl, the evaluation, the checkpoint. So a checkpoint knows
of its own evaluation, and a training that is resumed from it goes on behind both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from qpa.documents import Checkpoint, ChosenBank, Provenance
from qpa.errors import DivergedError
from qpa.progress import Progress
from qpa.seeds import split_seed
from qpa.termination import Terminated
from qpa.training.checkpoints import checkpoint_path, more_tensors, restore_optimizer, save_checkpoint
from qpa.training.objectives.objective import LOSS, as_metrics
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.processes import Processes
from qpa.training.training_log import TrainingLog, line_of_steps
from qpa.training.training_options import TrainingOptions

_LOWER = "lower `lr` or `angle_lr`"


@dataclass
class GeneratorCallback(TrainerCallback):  # type: ignore[misc]
    """Everything qpa does around the steps of a trainer that logs every one of them.

    The trainer's log history holds the steps since the last line of the log, and the step of that line: it
    is part of a checkpoint, so that a resumed training goes on in the middle of a line. Its best metric is
    the loss of the best evaluation.

    Args:    options: of the training.
             log: None in all processes but the first, which alone writes files.
             root: directory for checkpoints.
             save_steps: steps between them.
             seed: of the training; each step's dropout is drawn from it and the step's number.
             provenance, data_digest, bank: written into checkpoints.
             asks_to_end: tells after each step whether to save and end there.
             processes: that train together.
             evaluate: returns the objective's scores of the model as it is after a step.
             scaler: of the loss, where the training is in float16.
             resume_from: a checkpoint's directory and document.
    """

    options: TrainingOptions
    peft_model: Any
    optimizer: GeneratedAdapterOptimizer
    log: TrainingLog | None
    progress: Progress
    root: Path
    save_steps: int
    seed: int
    provenance: Provenance
    data_digest: str
    bank: ChosenBank | None
    asks_to_end: Callable[[], bool]
    processes: Processes
    evaluate: Callable[[int], Mapping[str, float]]
    scaler: torch.amp.GradScaler | None = None
    resume_from: tuple[Path, Checkpoint] | None = None
    last_saved: Path | None = field(default=None, init=False)
    _n_tokens_before: float = field(default=0, init=False)
    _scheduler: Any = field(default=None, init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        """Continue where the checkpoint stopped."""
        self._scheduler = lr_scheduler
        if self.resume_from is not None:
            self._resume(*self.resume_from, state, lr_scheduler)
        self.optimizer.check_same("at the start")

    def _resume(self, path: Path, document: Checkpoint, state: Any, lr_scheduler: Any) -> None:
        restore_optimizer(path, self.optimizer, document)
        scheduler_step = document.step
        if self.scaler is not None:
            scheduler_step = _restore_scaler(self.scaler, more_tensors(path))
        rates = [group["lr"] for group in self.optimizer.param_groups]
        resumed = {"last_epoch": scheduler_step, "_last_lr": rates}
        lr_scheduler.load_state_dict(lr_scheduler.state_dict() | resumed)
        self.last_saved = path
        if state.log_history:
            self._n_tokens_before = state.log_history[-1].get("num_tokens", 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed the step, in each process otherwise."""
        rank = self.processes.rank
        words = f"step {state.global_step}" + (f" process {rank}" if rank else "")
        torch.manual_seed(split_seed(self.seed, words))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Report progress, write a line, evaluate and write a checkpoint, each where it is time.

        Raises:  DivergedError: the loss is not finite.
                 Terminated: the training is asked to end; there is a checkpoint of this step.
        """
        if "loss" not in (logs or {}):
            return  # the trainer's summary at its end
        step, log_steps, latest = state.global_step, self.options.log_steps, state.log_history[-1]
        self._complete(latest)
        self._check_finite(latest)
        facts = {"loss": latest["loss"], "tokens": latest.get("num_tokens", 0.0)}
        self.progress("training", step, state.max_steps, facts)
        if step % log_steps == 0:
            steps = [one for one in state.log_history if one["step"] > step - log_steps]
            self._write(step, line_of_steps(steps))
            del state.log_history[:-1]
        ends = self.processes.any(self.asks_to_end(), args.device)
        is_best = self._evaluate(state)
        control.should_training_stop |= is_patience_over(self.options, step, state.best_global_step)
        if ends or is_best or step % self.save_steps == 0:
            self._save(state)
        if ends:
            raise Terminated(f"saved {self.last_saved}, go on with `resume`")

    def _complete(self, step: dict[str, float]) -> None:
        """Add what the trainer does not know of a step."""
        step["angle_learning_rate"] = step["learning_rate"] * self.optimizer.angle_ratio
        if self.optimizer.max_grad_norm:
            step["generator_grad_norm"] = self.optimizer.grad_norm
        if self.scaler is not None:
            step["loss_scale"] = self.scaler.get_scale()
        if "num_tokens" in step:
            step["num_tokens"] += self._n_tokens_before

    def _check_finite(self, step: dict[str, float]) -> None:
        """Check what a scaler of the loss would pass over: it skips a step whose gradient is not finite."""
        subject = f"step {step['step']}"
        if not math.isfinite(step["loss"]):
            raise DivergedError(subject, "a finite loss", str(step["loss"]), _LOWER)
        if step.get("loss_scale", 1.0) < 1.0:
            found = "no scale of the loss down to 1 that gives one"
            raise DivergedError(subject, "a finite gradient", found, f"{_LOWER}, or use `bf16`")

    def _evaluate(self, state: Any) -> bool:
        """Evaluate where it is time; return whether it is the best so far and to be kept.

        The last step's evaluation is not the callback's: it is made of what is frozen.
        """
        every = self.options.eval_steps
        if every is None or state.global_step % every or state.global_step >= state.max_steps:
            return False
        scores = self.evaluate(state.global_step)
        is_better = state.best_metric is None or scores[LOSS] < state.best_metric
        if is_better:
            state.best_metric, state.best_global_step = scores[LOSS], state.global_step
        if not is_patience_over(self.options, state.global_step, state.best_global_step):
            self._write(state.global_step, as_metrics(scores))
        return is_better and self.options.freezes_best

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(step, metrics)

    def _save(self, state: Any) -> None:
        self.optimizer.check_same(f"after step {state.global_step}")
        if not self.processes.is_first:
            self.last_saved = checkpoint_path(self.root, state.global_step)
            return
        keeps_best = self.options.freezes_best and state.best_metric is not None
        self.last_saved = save_checkpoint(
            self.root,
            self.peft_model,
            self.optimizer,
            state,
            provenance=self.provenance,
            data_digest=self.data_digest,
            bank=self.bank,
            n_kept=self.options.keep_checkpoints,
            best_step=state.best_global_step if keeps_best else None,
            more={}
            if self.scaler is None
            else _scaler_tensors(self.scaler, self._scheduler.state_dict()["last_epoch"]),
        )


def is_patience_over(options: TrainingOptions, step: int, best_step: int | None) -> bool:
    """Return whether the evaluations since the best one are as many as early stopping allows."""
    if options.early_stopping is None or options.eval_steps is None or not best_step:
        return False
    return (step - best_step) // options.eval_steps >= options.early_stopping


def _scaler_tensors(scaler: torch.amp.GradScaler, scheduler_step: int) -> dict[str, Tensor]:
    state = scaler.state_dict()
    return {
        "scaler.scale": torch.tensor(state["scale"], dtype=torch.float64),
        "scaler.growth_tracker": torch.tensor(state["_growth_tracker"]),
        "scheduler.step": torch.tensor(scheduler_step),
    }


def _restore_scaler(scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]) -> int:
    """Set a scaler to a checkpoint's state; return the schedule's step, which waits for skipped steps."""
    scale, growth = tensors["scaler.scale"].item(), tensors["scaler.growth_tracker"].item()
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": growth})
    return int(tensors["scheduler.step"].item())
