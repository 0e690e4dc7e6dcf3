"""Supervised fine-tuning: the loss of the next token, on texts or on the completions of prompts.

The trainer is TRL's SFTTrainer. Its loss takes the model apart to save memory at the head, and so it leaves
out an adapter that is on the head, is before the text or is not in a PEFT model, and it does not find the
layers of a model that names another attribute for them, as Llama 4 does. These train under transformers'
Trainer, with the same loss of the model as a whole. So do adapters of quantised bases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpa.compat.peft_ import is_adapted
from qpa.documents.trained_generator import perplexity
from qpa.progress import Progress
from qpa.training.data.packing import check_rows_apart, collate_packed
from qpa.training.data.splits import Splits, instruction_splits
from qpa.training.data.token_rows import Row
from qpa.training.evaluation import RowLosses, count_tokens, evaluate, evaluate_rows, summed_token_loss
from qpa.training.objectives.objective import LOSS, PERPLEXITY, make_arguments
from qpa.training.training_options import TrainingOptions

Collate = Callable[[list[Row]], dict[str, Tensor]]


class SFT:
    """Next-token loss in nats per token; padding and prompts do not count."""

    name: ClassVar[str] = "sft"

    def __init__(self, options: TrainingOptions, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
        self.collate_training: Collate = self.collate
        if options.packing:
            self.collate_training = partial(collate_packed, pad_token_id=tokenizer.pad_token_id)

    def rows(self, seed: int) -> Splits:
        """Read texts, prompts with completions, or conversations, and tokenise them.

        Raises:  DataError, OptionError: see `qpa.training.data.splits.instruction_splits`.
        """
        return instruction_splits(self.options, self.tokenizer, seed)

    def with_reference(self, model: Any, splits: Splits, progress: Progress) -> Splits:
        """Return the splits as they are: their loss needs no other model."""
        return splits

    def trainer(
        self, model: Any, optimizer: torch.optim.Optimizer, splits: Splits, **arguments: Any
    ) -> Trainer:
        """Return TRL's trainer, or one with the loss of the whole model.

        Raises:  OptionError: the model does not keep packed rows apart.
        """
        if self.options.packing:
            check_rows_apart(model, bf16=self.options.autocast_to is not None)
            arguments = {**arguments, "remove_unused_columns": False}
        rows_are_ready = {"skip_prepare_dataset": True}
        settings = make_arguments(SFTConfig, model, **arguments, dataset_kwargs=rows_are_ready)
        data = {
            "train_dataset": Dataset.from_list(splits.training),
            "eval_dataset": Dataset.from_list(splits.evaluation),
            "optimizers": (optimizer, None),
        }
        if not _needs_whole_model(model):
            collate = self.collate_training if self.options.packing else None
            return SFTTrainer(model, settings, processing_class=self.tokenizer, data_collator=collate, **data)
        # transformers asks the model for its arguments and its base, so it must be its own model or PEFT's.
        asked = model if isinstance(model, PeftModel) else model.get_base_model()
        return _WholeModelTrainer(asked, settings, data_collator=self.collate_training, **data)

    def calibration_loss(self, model: Any, rows: Sequence[Row]) -> Tensor:
        """Return the mean loss of the tokens of the rows that count."""
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate_training(list(rows)).items()}
        autocast_to = self.options.autocast_to
        with torch.autocast(device.type, autocast_to, enabled=autocast_to is not None):
            # With a cache, transformers would not keep packed rows apart.
            loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def scores(
        self, model: Any, rows: Sequence[Row], progress: Progress, description: str
    ) -> dict[str, float]:
        """Return the loss, weighted by tokens, and its exponential."""
        options = self.options
        found = evaluate(
            model,
            rows,
            self.collate,
            batch_size=options.batch_size,
            autocast_to=options.autocast_to,
            progress=progress,
            description=description,
        )
        return {LOSS: found.loss, PERPLEXITY: perplexity(found.loss)}

    def row_losses(self, model: Any, rows: Sequence[Row]) -> RowLosses:
        """Return the losses of single rows, weighted by tokens."""
        options = self.options
        return evaluate_rows(
            model, rows, self.collate, batch_size=options.batch_size, autocast_to=options.autocast_to
        )


def _needs_whole_model(model: Any) -> bool:
    """Return whether TRL's loss, which takes the model apart, would leave the adapter out or refuse it."""
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return True
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        return True  # of some of these TRL turns the adapter into bfloat16
    return is_adapted(base.get_output_embeddings()) or base.base_model is base


class _WholeModelTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the token-weighted loss from the model's own logits."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(
            **{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False
        )
        n_items = count_tokens(labels) if num_items_in_batch is None else num_items_in_batch
        loss = summed_token_loss(outputs.logits, labels) / n_items
        if num_items_in_batch is not None:  # it counts all processes' tokens, and gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
