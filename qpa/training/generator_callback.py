"""What qpa does around the steps of a trainer, whatever it trains for.

The trainer is used as it is. What is ours hangs in its callbacks: a seed for every step, checkpoints without
pickle, metrics, progress.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qpa.documents import Checkpoint, Provenance
from qpa.progress import Progress
from qpa.seeds import split_seed
from qpa.training.checkpoints import restore_optimizer, save_checkpoint
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.training_log import TrainingLog


@dataclass
class GeneratorCallback(TrainerCallback):  # type: ignore[misc]
    """Everything qpa does around the trainer's steps.

    Args:    root: directory for checkpoints.
             save_steps: steps between them.
             seed: of the training; each step's dropout is drawn from it and the step's number.
             provenance, data_digest: written into checkpoints.
             resume_from: a checkpoint's directory and document.
    """

    peft_model: Any
    optimizer: GeneratedAdapterOptimizer
    log: TrainingLog
    progress: Progress
    root: Path
    save_steps: int
    seed: int
    provenance: Provenance
    data_digest: str
    resume_from: tuple[Path, Checkpoint] | None = None
    last_saved: Path | None = field(default=None, init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        """Continue where the checkpoint stopped."""
        if self.resume_from is None:
            return
        path, document = self.resume_from
        restore_optimizer(path, self.optimizer, document)
        lr_scheduler.load_state_dict(lr_scheduler.state_dict() | {"last_epoch": document.step})
        self.last_saved = path

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed the step."""
        torch.manual_seed(split_seed(self.seed, f"step {state.global_step}"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress, and save every `save_steps` steps."""
        self.progress("training", state.global_step, state.max_steps)
        if state.global_step % self.save_steps == 0:
            self.last_saved = save_checkpoint(
                self.root,
                self.peft_model,
                self.optimizer,
                state,
                provenance=self.provenance,
                data_digest=self.data_digest,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Write the trainer's metrics, with both learning rates."""
        logs = dict(logs or {})
        if "loss" in logs:
            logs["angle_learning_rate"] = logs["learning_rate"] * self.optimizer.angle_ratio
            self.log.write(state.global_step, logs)
