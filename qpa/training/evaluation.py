"""Loss and perplexity that count real tokens only: padding and masked prompts do not count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qpa.progress import Progress
from qpa.training.data.token_rows import IGNORED


class RowLosses(NamedTuple):
    """The losses of single rows, whose weighted mean is the loss of all.

    Args:    sums: float64[n_rows], a row's loss times its weight: in nats where rows weigh as many as they
             have tokens with a loss.
             weights: float64[n_rows].
    """

    sums: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """Return the loss of all rows together."""
        return float(self.sums.sum() / self.weights.sum())


class TokenLoss(NamedTuple):
    """The mean loss in nats per token, and the number of tokens."""

    loss: float
    n_tokens: int


@torch.no_grad()
def evaluate(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    batch_size: int,
    autocast_to: torch.dtype | None,
    progress: Progress,
    description: str,
) -> TokenLoss:
    """Return the token-weighted loss of a causal language model over a split.

    Args:    rows: with "input_ids" and "labels" (-100: no loss).
             collate: pads a list of rows to a batch of input_ids, attention_mask and labels.
             autocast_to: run the model under autocast to this type; the loss itself is float32.
    Returns: sum over tokens of -log p, divided by their number.
    Source:  ours. The paper's own evaluation counts padding (arXiv 2410.09846, public code).
    """
    total, n_tokens, n_done = torch.zeros((), dtype=torch.float64), 0, 0
    for logits, labels in _answers(model, rows, collate, batch_size, autocast_to):
        total += summed_token_loss(logits, labels).cpu().double()
        n_tokens += count_tokens(labels)
        n_done += len(labels)
        progress(description, n_done, len(rows))
    return TokenLoss(float(total) / max(1, n_tokens), n_tokens)


@torch.no_grad()
def evaluate_rows(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    batch_size: int,
    autocast_to: torch.dtype | None,
) -> RowLosses:
    """Return the loss of every row, weighted by its tokens with a loss.

    Args:    rows .. autocast_to: see `evaluate`, whose loss is that of all rows, but for rounding.
    """
    sums, weights = [], []
    for logits, labels in _answers(model, rows, collate, batch_size, autocast_to):
        sums.append(-log_likelihoods(logits, labels).cpu().double())
        weights.append((labels[:, 1:] != IGNORED).sum(dim=1).cpu().double())
    return RowLosses(torch.cat(sums), torch.cat(weights))


def _answers(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int,
    autocast_to: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and labels, batch by batch, of the model in eval mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = {
            k: v.to(device)
            for k, v in collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))]).items()
        }
        labels = batch.pop("labels")
        with torch.autocast(device.type, autocast_to, enabled=autocast_to is not None):
            logits = model(**batch, use_cache=False).logits
        yield logits, labels
    model.train(was_training)


def causal_loss(model: Any, ids: Tensor, labels: Tensor, *, bf16: bool) -> Tensor:
    """Return the mean next-token loss of a batch without an attention mask, float32, in nats per token.

    Args:    ids: int64[n_rows, n_positions].
             labels: of the same shape, -100 where there is no loss; not shifted.
             bf16: run the model under bfloat16 autocast.
    """
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    return _next_token_loss(logits, labels, "mean")


def summed_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed next-token loss in nats, float32.

    Args:    logits: float[n_rows, n_positions, n_vocabulary].
             labels: int64[n_rows, n_positions], -100 where there is no loss; not shifted.
    """
    return _next_token_loss(logits, labels, "sum")


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how likely the labelled tokens of each row are together, float32[n_rows], in nats.

    Args:    logits, labels: see `summed_token_loss`.
    """
    wanted = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return -losses.sum(dim=1)


def _next_token_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )


def count_tokens(labels: Tensor) -> int:
    """Return how many positions of int64[n_rows, n_positions] labels carry a loss."""
    return int((labels[:, 1:] != IGNORED).sum())


def count_row_tokens(rows: Iterable[dict[str, Any]]) -> int:
    """Return how many tokens of rows with "labels" carry a loss."""
    return sum(count_tokens(torch.tensor([row["labels"]])) for row in rows)


def digest_of_rows(*splits: Sequence[dict[str, Any]]) -> str:
    """Return a digest of tokenised splits: ids and labels of every row, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            digest.update(
                json.dumps([list(row["input_ids"]), list(row["labels"])], separators=(",", ":")).encode()
            )
        digest.update(b"|")
    return "sha256:" + digest.hexdigest()
