"""Direct preference optimisation: of two answers to a prompt, the one that people prefer becomes more likely.

    loss = -log sigmoid(beta * (change of log p(chosen) - change of log p(rejected)))

The changes are against the reference, which is the model before its first step: the base model, or the base
with the adapter that the training goes on from. What the reference gives the answers is computed once, before
the first step, so that a step costs two rows for each pair and no second model.

TRL's DPOTrainer puts a second adapter on the model as the reference, and takes the model apart for its loss,
which leaves out some kinds of adapters. So the trainer is transformers', with the same loss.

Source:  Rafailov et al., arXiv 2305.18290, equation 7.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from trl.trainer.utils import disable_dropout_in_model

from qpa.progress import Progress
from qpa.training.data.splits import Splits, preference_splits
from qpa.training.data.token_rows import IGNORED, Row
from qpa.training.evaluation import RowLosses, log_likelihoods
from qpa.training.objectives.objective import LOSS, make_arguments
from qpa.training.training_options import TrainingOptions

REFERENCE = "reference"
"""The name in a row of what the reference gives both answers: their log-likelihoods in nats, chosen first."""


class Judged(NamedTuple):
    """What a model makes of pairs.

    Args:    losses: float32[n_pairs].
             margins: float32[n_pairs], beta times how much further chosen answers rose than rejected ones.
    """

    losses: Tensor
    margins: Tensor

    def accuracies(self) -> Tensor:
        """Return float32[n_pairs]: whether the chosen answer rose further, 1/2 where neither did."""
        return (self.margins.sign() + 1) / 2


class DPO:
    """Preference of chosen answers over rejected ones; only the answers' tokens count."""

    name: ClassVar[str] = "dpo"

    def __init__(self, options: TrainingOptions, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def rows(self, seed: int) -> Splits:
        """Read prompts, each with a chosen and a rejected answer, and tokenise them.

        Raises:  DataError, OptionError: see `qpa.training.data.splits.preference_splits`.
        """
        return preference_splits(self.options, self.tokenizer, seed)

    def with_reference(self, model: Any, splits: Splits, progress: Progress) -> Splits:
        """Return the splits with what the model, which is the reference, gives both answers of each row."""
        training, evaluation = (
            self._with_reference(model, rows, progress) for rows in (splits.training, splits.evaluation)
        )
        return Splits(training, evaluation, splits.summary)

    def trainer(
        self, model: Any, optimizer: torch.optim.Optimizer, splits: Splits, **arguments: Any
    ) -> Trainer:
        """Return transformers' trainer with the loss of pairs; dropout is off, as in TRL's."""
        disable_dropout_in_model(model)
        settings = make_arguments(TrainingArguments, model, **arguments, remove_unused_columns=False)
        names = ("prompt_ids", "chosen_ids", "rejected_ids", REFERENCE)
        data = Dataset.from_list([{name: row[name] for name in names} for row in splits.training])
        asked = model if isinstance(model, PeftModel) else model.get_base_model()
        return PairTrainer(self, asked, settings, data, optimizer)

    def calibration_loss(self, model: Any, rows: Sequence[Row]) -> Tensor:
        """Return the mean loss of the pairs."""
        return self.judge(model, self.collate(rows)).losses.mean()

    @torch.no_grad()
    def scores(
        self, model: Any, rows: Sequence[Row], progress: Progress, description: str
    ) -> dict[str, float]:
        """Return the loss, in how many pairs the chosen answer rose further, and by how much in the mean."""
        every = self._judge_all(model, rows, lambda n_done: progress(description, n_done, len(rows)))
        return {
            LOSS: float(every.losses.mean()),
            "accuracy": float(every.accuracies().mean()),
            "margin": float(every.margins.mean()),
        }

    @torch.no_grad()
    def row_losses(self, model: Any, rows: Sequence[Row]) -> RowLosses:
        """Return the losses of single pairs, which all have the same weight."""
        losses = self._judge_all(model, rows, lambda n_done: None).losses
        return RowLosses(losses, torch.ones_like(losses))

    def _judge_all(self, model: Any, rows: Sequence[Row], tell: Callable[[int], None]) -> Judged:
        """Return what a model in eval mode makes of all pairs, float64 on the CPU."""
        was_training = model.training
        model.eval()
        judged = []
        for first in range(0, len(rows), self.options.batch_size):
            batch = rows[first : first + self.options.batch_size]
            judged.append(Judged(*(part.double().cpu() for part in self.judge(model, self.collate(batch)))))
            tell(first + len(batch))
        model.train(was_training)
        return Judged(*(torch.cat(parts) for parts in zip(*judged, strict=True)))

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch of pairs: first the prompts with chosen answers, then those with rejected ones.

        Returns: input_ids, attention_mask and labels, int64[2 * n_pairs, n_positions], and, where the rows
                 have it, the reference, float32[n_pairs, 2].
        """
        pairs = [
            (row["prompt_ids"], row[answer]) for answer in ("chosen_ids", "rejected_ids") for row in rows
        ]
        length = self.options.max_length
        ids = [torch.tensor((prompt + answer)[:length]) for prompt, answer in pairs]
        labels = [torch.tensor(([IGNORED] * len(prompt) + answer)[:length]) for prompt, answer in pairs]
        padding = self.tokenizer.pad_token_id
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        if REFERENCE in rows[0]:
            batch[REFERENCE] = torch.tensor([row[REFERENCE] for row in rows])
        return batch

    def judge(self, model: Any, batch: Mapping[str, Tensor]) -> Judged:
        """Return what a model makes of a batch of `collate`; autograd reaches the adapter from the losses."""
        device = next(model.parameters()).device
        reference = batch[REFERENCE].to(device)
        change = self._log_likelihoods(model, batch) - reference.T
        margins = self.options.beta * (change[0] - change[1])
        return Judged(-logsigmoid(margins), margins.detach())

    def _log_likelihoods(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-likelihoods of the answers, float32[2, n_pairs], in nats."""
        device, autocast_to = next(model.parameters()).device, self.options.autocast_to
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.autocast(device.type, autocast_to, enabled=autocast_to is not None):
            logits = model(**inputs, use_cache=False).logits
        return log_likelihoods(logits, batch["labels"].to(device)).view(2, -1)

    @torch.no_grad()
    def _with_reference(self, model: Any, rows: Sequence[Row], progress: Progress) -> list[Row]:
        was_training = model.training
        model.eval()
        found: list[Row] = []
        for first in range(0, len(rows), self.options.batch_size):
            batch = rows[first : first + self.options.batch_size]
            values = self._log_likelihoods(model, self.collate(batch)).T.tolist()
            found += [{**row, REFERENCE: value} for row, value in zip(batch, values, strict=True)]
            progress("asking the reference", len(found), len(rows))
        model.train(was_training)
        return found


class PairTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the mean loss of pairs, which logs how they are judged."""

    def __init__(
        self,
        objective: DPO,
        model: Any,
        settings: TrainingArguments,
        data: Dataset,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        super().__init__(
            model,
            settings,
            data_collator=objective.collate,
            train_dataset=data,
            optimizers=(optimizer, None),
        )
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # pairs are counted, and not tokens
        self._judged: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        judged = self.objective.judge(model, inputs)
        self._judged["accuracy"].append(float(judged.accuracies().mean()))
        self._judged["margin"].append(float(judged.margins.mean()))
        loss = judged.losses.mean()
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the micro-batches since the last line."""
        means = {name: sum(values) / len(values) for name, values in self._judged.items()}
        self._judged.clear()
        super().log({**logs, **means}, start_time)
