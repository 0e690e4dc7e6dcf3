"""Several short rows in one, each of which sees itself alone.

Rules:
1. Rows are packed best fit first, the longest ones before, by TRL (arXiv 2404.10830); a row is never cut.
2. Position ids start anew with each row. From these alone the attention of transformers makes a mask in
   blocks, so the batch has no attention mask: padding is a row of one token each.
3. Whether a model holds to it is asked of the model itself, with its weights, before it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qpa.errors import OptionError
from qpa.training.data.token_rows import IGNORED, Row

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = "seq_lengths"
"""The column of packed rows with the lengths of the rows in each."""

_N_TOKENS = 8
_LARGEST_LEAK = 1e-6
"""The largest derivative by another row's embedding over that by a row's own; with a mask it is zero."""

_LARGEST_DIFFERENCE = {False: 1e-3, True: 1e-1}
"""The largest difference of the answers to a row alone, over the largest answer; under bfloat16 or not."""


def pack_rows(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Return packed rows of at most `max_length` tokens, with the lengths of the rows in each.

    The first token of each row has no label, since nothing before it is its own.
    """
    from datasets import Dataset
    from trl import pack_dataset

    whole = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows]
    packed = pack_dataset(Dataset.from_list(whole), max_length, "bfd")
    return [_without_first_labels(row) for row in packed.to_list()]


def collate_packed(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Return a batch of input_ids, labels and position_ids, int64[n_rows, n_positions].

    Args:    rows: packed, or not.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = [row.get(LENGTHS) or [len(row["input_ids"])] for row in rows]
    positions = [[place for length in of_row for place in range(length)] for of_row in lengths]

    def padded(values: Sequence[Sequence[int]], padding: int) -> Tensor:
        return pad_sequence([torch.tensor(one) for one in values], batch_first=True, padding_value=padding)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token_id),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "position_ids": padded(positions, 0),
    }


def check_rows_apart(model: Any, *, bf16: bool = False) -> None:
    """Check that a model answers a packed row as it would the row alone, by two passes over a few tokens.

    Args:    model: of transformers, with its adapter or without, on any device; it is left as it was.
             bf16: run the model under bfloat16 autocast.
    Raises:  OptionError: rows see one another, or the model takes no position ids.
    """
    import torch

    device = next(model.parameters()).device
    embedding = _embedding(model)
    n_known = embedding.weight.shape[0]
    ids = (torch.arange(2 * _N_TOKENS, device=device) + n_known // 2) % n_known
    positions = torch.arange(_N_TOKENS, device=device)
    was_training = model.training
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model.eval()
            leak, packed = _second_row(model, ids, positions)
            with torch.no_grad():
                alone = model(input_ids=ids[None, _N_TOKENS:], use_cache=False).logits[0].float()
    except (TypeError, ValueError) as error:
        raise _refusal(f"{type(model).__name__}, which takes no position ids") from error
    finally:
        model.train(was_training)
    difference = float((packed - alone).abs().max() / alone.abs().max())
    if not (leak <= _LARGEST_LEAK and difference <= _LARGEST_DIFFERENCE[bf16]):
        raise _refusal("one that lets rows see one another")


def _second_row(model: Any, ids: Tensor, positions: Tensor) -> tuple[float, Tensor]:
    """Return the relative derivative of a packed second row's answers by the first row, and the answers.

    Args:    ids: int64[2 n]; the two rows.
             positions: int64[n]; of each of them.
    Returns: the answers as float32[n, n_vocabulary].
    """
    import torch

    leaves: list[Tensor] = []

    def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()

    n_tokens = len(positions)
    hook = _embedding(model).register_forward_hook(replace)
    try:
        with torch.enable_grad():
            # Twice, since some kinds of attention keep rows apart in a batch of one alone.
            both = torch.cat([positions, positions]).repeat(2, 1)
            logits = model(input_ids=ids.repeat(2, 1), position_ids=both, use_cache=False).logits
            answers = logits[0, -n_tokens:].float()
            (gradient,) = torch.autograd.grad(answers.square().sum(), leaves[0])
    finally:
        hook.remove()
    by_position = gradient.float().reshape(2, 2 * n_tokens, -1)[0].norm(dim=1)
    return float(by_position[:n_tokens].max() / by_position[n_tokens:].max()), answers.detach()


def _embedding(model: Any) -> Any:
    """Return the token embedding of a model with an adapter or without."""
    return getattr(model, "get_base_model", lambda: model)().get_input_embeddings()


def _without_first_labels(row: Row) -> Row:
    start = 0
    for length in row[LENGTHS]:
        row["labels"][start] = IGNORED
        start += length
    return row


def _refusal(found: str) -> OptionError:
    expected = "a model and an adapter that keep packed rows apart"
    return OptionError("packing", expected, found, "train without `packing`")
