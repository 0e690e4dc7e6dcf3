"""TRL's SFTTrainer, set up for a generated adapter.

The trainer is used as it is. What is ours hangs in its callbacks: a seed for every step, checkpoints
without pickle, metrics, progress.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qpa.documents import Checkpoint, Provenance
from qpa.errors import DataError
from qpa.progress import Progress
from qpa.seeds import split_seed
from qpa.training.checkpoints import restore_optimizer, save_checkpoint
from qpa.training.evaluation import count_tokens, summed_token_loss
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.text_data import Row
from qpa.training.training_log import TrainingLog


def make_trainer(
    peft_model: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    splits: tuple[list[Row], list[Row]],
    *,
    output: Path,
    seed: int,
    bf16: bool,
    **options: Any,
) -> Any:
    """Return an SFTTrainer that logs and saves nothing by itself.

    Args:    peft_model: in PEFT or a `qpa.adapters.feed_forward.FeedForwardModel`, on the device to train on.
             splits: training and evaluation rows, as `qpa.training.text_data.read_splits` returns them.
             output: a directory the trainer may create.
             bf16: bfloat16 autocast; TRL's own default is on.
             options: further fields of `trl.SFTConfig`.
    Raises:  DataError: truncation to max_length leaves a split without a token to learn from.
    """
    arguments = SFTConfig(
        output_dir=str(output),
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        use_cpu=next(peft_model.parameters()).device.type == "cpu",
        dataloader_pin_memory=next(peft_model.parameters()).device.type != "cpu",
        bf16=bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="cosine",
        **{"activation_checkpointing": False, **options},
    )
    arguments._n_gpu = 1  # several visible devices would make Trainer wrap the model in DataParallel
    datasets = {
        "train_dataset": Dataset.from_list(splits[0]),
        "eval_dataset": Dataset.from_list(splits[1]),
    }
    if _needs_whole_model(peft_model):
        trainer = _whole_model_trainer(peft_model, optimizer, tokenizer, arguments, datasets)
    else:
        trainer = SFTTrainer(
            peft_model, arguments, processing_class=tokenizer, optimizers=(optimizer, None), **datasets
        )
    trainer.remove_callback(PrinterCallback)
    for name, dataset in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if len(dataset) == 0:
            raise DataError(
                f"the {name} split", "a completion within `max_length`", "none", "raise `max_length`"
            )
    return trainer


def _needs_whole_model(peft_model: Any) -> bool:
    """Return whether TRL's loss, which takes the model apart, would leave the adapter out or refuse it."""
    if not isinstance(peft_model, PeftModel) or peft_model.active_peft_config.is_prompt_learning:
        return True
    return isinstance(peft_model.get_base_model().get_output_embeddings(), BaseTunerLayer)


def _whole_model_trainer(
    peft_model: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    arguments: Any,
    datasets: dict[str, Any],
) -> Any:
    """Return a trainer with the loss of the whole model.

    SFTTrainer only prepares the data here.
    """
    prepared = SFTTrainer(peft_model.get_base_model(), arguments, processing_class=tokenizer, **datasets)
    # transformers asks what it trains for its arguments and its base: a model of its own or of PEFT.
    model = peft_model if isinstance(peft_model, PeftModel) else peft_model.get_base_model()
    return _WholeModelTrainer(
        model,
        arguments,
        data_collator=prepared.data_collator,
        train_dataset=prepared.train_dataset,
        eval_dataset=prepared.eval_dataset,
        optimizers=(optimizer, None),
    )


class _WholeModelTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the token-weighted loss from the model's own logits.

    It loads no weights to resume: the optimizer's state makes the adapter again.
    """

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Leave the model as it is."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(
            **{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False
        )
        n_items = count_tokens(labels) if num_items_in_batch is None else num_items_in_batch
        loss = summed_token_loss(outputs.logits, labels) / n_items
        return (loss, outputs) if return_outputs else loss


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
        lr_scheduler.load_state_dict(
            {"last_epoch": document.step, "_step_count": document.step + 1, "_last_lr": [document.lr]}
            | {"base_lrs": lr_scheduler.base_lrs, "lr_lambdas": [None]}
        )
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
