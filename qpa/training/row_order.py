"""Which rows a process takes in which step: together, those that one process would take.

One process takes its batches in the order that the data's seed draws, `grad_accum` of them a step. Of n
processes, process k takes batches k, k + n, k + 2 n and so on of the same order, and a share of 1 / n of
`grad_accum`. Where an epoch's batches are no multiple of n, accelerate would begin the epoch again for the
processes that have one too few, and train on these rows twice. Here they get rows without loss.

Source:  ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import concatenate_datasets
from torch.utils.data import Sampler

from qpa.compat.transformers_ import use_row_order
from qpa.training.data.token_rows import IGNORED


class RowOrder(Sampler[int]):
    """The order of an epoch's rows in one process, and behind it rows that carry no loss.

    Args:    n_rows: rows to learn from; n_blank: rows behind them in the data.
             seed: of the order.
    """

    def __init__(self, n_rows: int, n_blank: int, seed: int) -> None:
        generator = torch.Generator()
        self._shuffled = SeedableRandomSampler(range(n_rows), generator=generator, data_seed=seed)
        self._blank = range(n_rows, n_rows + n_blank)

    def __len__(self) -> int:
        """Return how many rows an epoch has."""
        return len(self._shuffled) + len(self._blank)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of an epoch's rows."""
        yield from self._shuffled
        yield from self._blank

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._shuffled.set_epoch(epoch)


def even_out(trainer: Any, n_processes: int) -> None:
    """Give all processes as many batches, without a row that counts twice.

    Where rows have no labels, as in preference learning, accelerate repeats the first rows of the epoch.

    Args:    trainer: of transformers, before it trains; its training data gets rows without loss.
    """
    data, arguments = trainer.train_dataset, trainer.args
    if n_processes == 1 or "labels" not in data.column_names:
        return
    n_blank = -len(data) % (arguments.per_device_train_batch_size * n_processes)
    use_row_order(trainer, RowOrder(len(data), n_blank, arguments.data_seed))
    if n_blank:
        first = data.select([0] * n_blank)
        blank = first.map(lambda row: {"labels": [IGNORED] * len(row["labels"])}, features=data.features)
        trainer.train_dataset = concatenate_datasets([data, blank])
