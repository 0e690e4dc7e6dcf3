"""An objective from outside: smoothed labels under transformers' own trainer, scored by its accuracy too."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from qpa.training.data.splits import instruction_splits
from qpa.training.evaluation import RowLosses
from qpa.training.objectives.objective import LOSS, make_arguments

SMOOTHING = 0.3


class SmoothedLabels:
    """A share of the right token's probability is spread over the vocabulary."""

    name = "smoothed-labels"

    def __init__(self, options, tokenizer):
        self.options, self.tokenizer = options, tokenizer

    def rows(self, seed):
        return instruction_splits(self.options, self.tokenizer, seed)

    def with_reference(self, model, splits, progress):
        return splits

    def trainer(self, model, optimizer, splits, **arguments):
        settings = make_arguments(TrainingArguments, model, **arguments, label_smoothing_factor=SMOOTHING)
        data = {"train_dataset": splits.training, "data_collator": collate}
        return Trainer(model, settings, **data, optimizers=(optimizer, None))

    def calibration_loss(self, model, rows):
        loss, _ = smoothed_loss(model, rows)
        return loss

    @torch.no_grad()
    def scores(self, model, rows, progress, description):
        loss, accuracy = smoothed_loss(model.eval(), rows)
        progress(description, len(rows), len(rows))
        return {LOSS: float(loss), "accuracy": float(accuracy)}

    @torch.no_grad()
    def row_losses(self, model, rows):
        losses = torch.stack([smoothed_loss(model.eval(), [row])[0].double() for row in rows])
        n_tokens = torch.tensor([len(row["labels"]) - 1.0 for row in rows], dtype=torch.float64)
        return RowLosses(losses * n_tokens, n_tokens)


def collate(rows):
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def smoothed_loss(model, rows):
    """Return the loss of a token, and the share of tokens that the model finds likeliest."""
    batch = collate(rows)
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    is_right = (logits.argmax(1) == labels)[labels != -100]
    return cross_entropy(logits, labels, label_smoothing=SMOOTHING), is_right.float().mean()
