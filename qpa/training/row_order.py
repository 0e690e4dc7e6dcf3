"""Which rows a process takes in which step: together, those that one process would take.

One process takes its batches in the order that the data's seed draws, `grad_accum` of them a step. Of n
processes, process k takes batches k, k + n, k + 2 n and so on of the same order, and a share of 1 / n of
`grad_accum`. Where an epoch's batches are no multiple of n, accelerate would begin the epoch again for the
processes that have one too few, and train on these rows twice. Here they get rows without loss.

Where a generator has contexts, every step is of one context: its rows, in all processes, are from one source
of the data, and a source's last step of an epoch is filled up with rows without loss. The sources take turns,
each as often as it has steps, spread evenly over the epoch and shifted at random.

Source:  ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import concatenate_datasets
from torch.utils.data import Sampler

from qpa.compat.transformers_ import use_row_order
from qpa.seeds import split_seed
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


class ContextOrder(Sampler[int]):
    """The order of an epoch's rows, in blocks of one context each.

    Args:    sizes: rows of each context, whose rows follow each other in the data; one without loss is behind
             them.
             n_block: rows of a step, in all processes together.
             seed: of the order.
    """

    def __init__(self, sizes: Sequence[int], n_block: int, seed: int) -> None:
        self.sizes, self.n_block, self.seed = tuple(sizes), n_block, seed
        self._n_turns = [-(-size // n_block) for size in sizes]
        self.n_steps = sum(self._n_turns)
        self._epoch = 0
        self._turns = cache(self._draw_turns)

    def __len__(self) -> int:
        """Return how many rows an epoch has."""
        return self.n_steps * self.n_block

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of an epoch's rows."""
        rows = [iter(self._shuffled(context)) for context in range(len(self.sizes))]
        for context in self._turns(self._epoch):
            for _ in range(self.n_block):
                yield next(rows[context], sum(self.sizes))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._epoch = epoch

    def context_of_step(self, step: int) -> int:
        """Return the number of the context of a step of the training, which are counted from 0."""
        epoch, place = divmod(step, self.n_steps)
        return self._turns(epoch)[place]

    def _draw_turns(self, epoch: int) -> list[int]:
        drawn = random.Random(split_seed(self.seed, f"turns of epoch {epoch}"))
        turns = [
            ((turn + drawn.random()) / n_turns, context)
            for context, n_turns in enumerate(self._n_turns)
            for turn in range(n_turns)
        ]
        return [context for _, context in sorted(turns)]

    def _shuffled(self, context: int) -> list[int]:
        first = sum(self.sizes[:context])
        rows = list(range(first, first + self.sizes[context]))
        random.Random(split_seed(self.seed, f"rows of {context} in epoch {self._epoch}")).shuffle(rows)
        return rows


def order_contexts(trainer: Any, order: ContextOrder) -> None:
    """Give a trainer its rows in blocks of one context each.

    Args:    trainer: of transformers, before it trains; its training data gets a row without loss.
    """
    use_row_order(trainer, order)
    _add_blank(trainer, 1)


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
        _add_blank(trainer, n_blank)


def _add_blank(trainer: Any, n: int) -> None:
    """Put rows without loss behind a trainer's rows."""
    data = trainer.train_dataset
    first = data.select([0] * n)
    blank = first.map(lambda row: {"labels": [IGNORED] * len(row["labels"])}, features=data.features)
    trainer.train_dataset = concatenate_datasets([data, blank])
