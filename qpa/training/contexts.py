"""Contexts of prompts: what the base model makes of a text, in a few numbers.

Rules:
1. The state of a text is the mean, over its tokens, of the base model's last hidden state; of a task, over
   the tokens of a few of its training rows.
2. A fixed random matrix, which the plan's seed draws, takes the state to the size of a context.
3. The mean of all tasks is subtracted, and their root mean square is the unit: what texts have in common
   says nothing, and networks learn best from inputs of about 1. Both are kept with the generator, so that
   any other text has a context too.

Source: ours; arXiv 2402.17760 programs from each input of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qpa.errors import DataError
from qpa.generators.fast_weights import ContextVectors
from qpa.seeds import split_seed
from qpa.training.data.splits import cut_blocks
from qpa.training.data.token_rows import Row

N_ROWS = 16
"""How many rows of a text its state is read from at most; they are spread evenly over it."""


def set_contexts(model: Any, vectors: ContextVectors, rows: Sequence[Sequence[Row]], seed: int) -> None:
    """Set the contexts of prompts to what the base model makes of each task's rows.

    Args:    model: with the adapter, which is left out meanwhile.
             rows: the training rows of every task.
             seed: of the layout.
    """
    size = vectors.vectors.shape[1]
    with model.disable_adapter():
        raw = [_raw(model, [row["input_ids"] for row in own], size, seed) for own in rows]
    vectors.set_raw(torch.stack(raw))


def rows_of_prompt(tokenizer: Any, prompt: str, max_length: int) -> list[list[int]]:
    """Return the tokens of a text, in rows of at most `max_length`.

    Raises:  DataError: the text has fewer than two tokens.
    """
    rows = cut_blocks(tokenizer(prompt, verbose=False)["input_ids"], max_length)
    if not rows:
        raise DataError("the prompt", "at least 2 tokens", "too short")
    return rows


def context_of_rows(model: Any, rows: Sequence[Sequence[int]], vectors: ContextVectors, seed: int) -> Tensor:
    """Return float32[size], the context of any text.

    Args:    model: the base model.
             rows: the text's tokens.
             seed: of the layout.
    """
    return vectors.normalised(_raw(model, rows, vectors.vectors.shape[1], seed))


def _raw(model: Any, rows: Sequence[Sequence[int]], size: int, seed: int) -> Tensor:
    """Return float32[size], a text's state after the random map."""
    state = _state(model, rows)
    random = torch.Generator().manual_seed(split_seed(seed, "contexts of prompts"))
    return torch.randn(size, len(state), generator=random) @ state / math.sqrt(len(state))


@torch.no_grad()
def _state(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return float32[hidden], the mean last hidden state over the tokens of a few rows."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    chosen = [rows[place * len(rows) // N_ROWS] for place in range(N_ROWS)] if len(rows) > N_ROWS else rows
    total, n = torch.zeros(()), 0
    for ids in chosen:
        asked = model(input_ids=torch.tensor([list(ids)], device=device), output_hidden_states=True)
        total = total + asked.hidden_states[-1][0].float().sum(0).cpu()
        n += len(ids)
    model.train(was_training)
    return total / n
