"""What qpa does around the steps of a trainer, whatever it trains for.

The trainer is used as it is. qpa's own work is done in a callback, which gives every step its seed, writes
checkpoints without pickle and metrics, and reports progress.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qpa.documents import Checkpoint, Provenance
from qpa.progress import Progress
from qpa.seeds import split_seed
from qpa.termination import Terminated
from qpa.training.checkpoints import checkpoint_path, restore_optimizer, save_checkpoint
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.processes import Processes
from qpa.training.training_log import LOG_STEPS, TrainingLog, line_of_steps


@dataclass
class GeneratorCallback(TrainerCallback):  # type: ignore[misc]
    """Everything qpa does around the steps of a trainer that logs every one of them.

    The trainer's log history holds the steps since the last line of the log, and the step of that line: it
    is part of a checkpoint, so that a resumed training goes on in the middle of a line.

    Args:    log: None in all processes but the first, which alone writes files.
             root: directory for checkpoints.
             save_steps: steps between them.
             seed: of the training; each step's dropout is drawn from it and the step's number.
             provenance, data_digest: written into checkpoints.
             asks_to_end: tells after each step whether to save and end there.
             processes: that train together.
             resume_from: a checkpoint's directory and document.
    """

    peft_model: Any
    optimizer: GeneratedAdapterOptimizer
    log: TrainingLog | None
    progress: Progress
    root: Path
    save_steps: int
    seed: int
    provenance: Provenance
    data_digest: str
    asks_to_end: Callable[[], bool]
    processes: Processes
    resume_from: tuple[Path, Checkpoint] | None = None
    last_saved: Path | None = field(default=None, init=False)
    _n_tokens_before: float = field(default=0, init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        """Continue where the checkpoint stopped."""
        if self.resume_from is not None:
            self._resume(*self.resume_from, state, lr_scheduler)
        self.optimizer.check_same("at the start")

    def _resume(self, path: Path, document: Checkpoint, state: Any, lr_scheduler: Any) -> None:
        restore_optimizer(path, self.optimizer, document)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        resumed = {"last_epoch": document.step, "_last_lr": rates}
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
        """Report progress, write a line every `LOG_STEPS` steps, then a checkpoint every `save_steps` steps.

        Raises:  Terminated: the training is asked to end; there is a checkpoint of this step.
        """
        if "loss" not in (logs or {}):
            return  # the trainer's summary at its end
        step = state.log_history[-1]
        self._complete(step)
        facts = {"loss": step["loss"], "tokens": step.get("num_tokens", 0.0)}
        self.progress("training", state.global_step, state.max_steps, facts)
        if state.global_step % LOG_STEPS == 0:
            first = state.global_step - LOG_STEPS + 1
            steps = [step for step in state.log_history if step["step"] >= first]
            if self.log is not None:
                self.log.write(state.global_step, line_of_steps(steps))
            del state.log_history[:-1]
        ends = self.processes.any(self.asks_to_end(), args.device)
        if ends or state.global_step % self.save_steps == 0:
            self._save(state)
        if ends:
            raise Terminated(f"saved {self.last_saved}, go on with `resume`")

    def _complete(self, step: dict[str, float]) -> None:
        """Add the angles' learning rate, and the tokens that were counted before the training was resumed."""
        step["angle_learning_rate"] = step["learning_rate"] * self.optimizer.angle_ratio
        if "num_tokens" in step:
            step["num_tokens"] += self._n_tokens_before

    def _save(self, state: Any) -> None:
        self.optimizer.check_same(f"after step {state.global_step}")
        if not self.processes.is_first:
            self.last_saved = checkpoint_path(self.root, state.global_step)
            return
        self.last_saved = save_checkpoint(
            self.root,
            self.peft_model,
            self.optimizer,
            state,
            provenance=self.provenance,
            data_digest=self.data_digest,
        )
