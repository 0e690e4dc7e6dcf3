"""The first rows of a training as the model gets them, with what carries the loss, and without the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qpa.documents import BaseModelReference, DataSummary
from qpa.seeds import split_seed
from qpa.training.data.packing import LENGTHS
from qpa.training.data.splits import ANSWERS
from qpa.training.data.token_rows import IGNORED, Row

if TYPE_CHECKING:
    from qpa.training.training_options import TrainingOptions


@dataclass(frozen=True)
class Piece:
    """Text of neighbouring tokens, all of which carry the loss, or none."""

    text: str
    n_tokens: int
    has_loss: bool


@dataclass(frozen=True)
class PreviewedText:
    """What one row, one of the rows in a packed one, or one answer of a preference looks like."""

    pieces: tuple[Piece, ...]

    @property
    def n_tokens(self) -> int:
        """Return the number of its tokens."""
        return sum(piece.n_tokens for piece in self.pieces)

    @property
    def n_loss_tokens(self) -> int:
        """Return the number of its tokens that carry the loss."""
        return sum(piece.n_tokens for piece in self.pieces if piece.has_loss)


@dataclass(frozen=True)
class DataPreview:
    """A few rows of the training split, and the counts of both splits.

    Args:    rows: the first rows, each with its parts: several where it is packed, or is a preference.
             n_rows: rows of the training split.
             summary: counts; None where the objective does not count.
             max_length: tokens that fit a row.
    """

    rows: tuple[tuple[PreviewedText, ...], ...]
    n_rows: int
    summary: DataSummary | None
    max_length: int


def preview_data(
    options: TrainingOptions,
    base: BaseModelReference,
    seed: int,
    n_rows: int,
    *,
    trust_remote_code: bool = False,
) -> DataPreview:
    """Prepare the data as a training does, and return its first rows.

    Args:    seed: of the training.
             n_rows: the most rows to return.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Raises:  DataError, OptionError, ModelError: the data, an option or the tokenizer is wrong.
    """
    from qpa.models.base_model import load_tokenizer
    from qpa.training.objectives.objective import OBJECTIVES

    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    splits = OBJECTIVES[options.objective](options, tokenizer).rows(split_seed(seed, "split"))
    rows = tuple(
        tuple(PreviewedText(tuple(_pieces(ids, labels, tokenizer))) for ids, labels in _parts(row))
        for row in splits.training[:n_rows]
    )
    return DataPreview(rows, len(splits.training), splits.summary, options.max_length)


def _parts(row: Row) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yield the token ids and labels of what the model sees as one text."""
    if all(name in row for name in ANSWERS):
        prompt = row["prompt_ids"]
        for name in ANSWERS:
            answer = row[name]
            yield [*prompt, *answer], [*[IGNORED] * len(prompt), *answer]
        return
    start = 0
    for length in row.get(LENGTHS) or [len(row["input_ids"])]:
        part = slice(start, start + length)
        yield row["input_ids"][part], row["labels"][part]
        start += length


def _pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[Piece]:
    pairs = zip(ids, [label != IGNORED for label in labels], strict=True)
    for has_loss, run in groupby(pairs, key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        yield Piece(tokenizer.decode(tokens), len(tokens), has_loss)
