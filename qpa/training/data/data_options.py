"""What a user may ask of the data: the options of a training that say which rows there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qpa.pipeline.options import option

LOSS_ON = ("completion", "assistant", "all")
"""The tokens that may carry the loss, see `qpa.training.data.token_rows`."""

EVAL_SHARE = 0.1

N_CALIBRATION_BATCHES = 8
"""Batches of which the gradient is read for directions."""


@dataclass(frozen=True)
class DataOptions:
    """The options of the data.

    Args:    data, eval_data: names of files, directories or datasets, see
             `qpa.training.data.sources.source`; a single name may be given as it is.
             data_revision: the revision of datasets of the Hub.
             eval_share: the share of `data` that is held out where there is no `eval_data`.
             columns: "theirs=ours" for columns of other names, see `qpa.training.data.shapes`.
             chat_template: a file with a chat template, or "trl"; None is the tokenizer's.
             loss_on: which tokens carry the loss, one of `LOSS_ON`; None is what suits the rows.
             max_length: tokens per row.
             packing: put several short rows into one of `max_length` tokens.
    """

    panel: ClassVar[str] = "Data"

    section: ClassVar[str] = "train"

    # What the files hold is pinned by a digest; where they are changes nothing.
    data: tuple[str, ...] = option(
        help="Text, json, jsonl, csv or parquet files, directories, or datasets of the Hub, separated by "
        "commas.",
        is_path=True,
        provenance=False,
    )
    eval_data: tuple[str, ...] | None = option(
        None,
        help="The same to evaluate on.",
        is_path=True,
        shown_default="`eval_share` of `data`, held out",
        provenance=False,
    )
    data_revision: str | None = option(
        None,
        help="Revision of datasets of the Hub.",
        shown_default="the newest",
        provenance=False,
    )
    eval_share: float = option(EVAL_SHARE, help="Share of `data` to hold out.", above=0, at_most=0.9)
    columns: tuple[str, ...] | None = option(
        None, help="Columns of other names, such as question=prompt,answer=completion."
    )
    chat_template: str | None = option(
        None,
        help="File with a chat template, or trl for TRL's training variant of the tokenizer's.",
        is_path=True,
        shown_default="the tokenizer's",
        provenance=False,
    )
    loss_on: str | None = option(
        None,
        help="What carries the loss: {choices}.",
        choices=LOSS_ON,
        shown_default="completions, and the assistant's turns of messages",
    )
    max_length: int = option(256, help="Tokens per row.", at_least=2, unit="tokens")
    packing: bool = option(False, help="Put several short rows into one; they do not see each other.")


@dataclass(frozen=True)
class TrainingData:
    """Where the data of a training is, which its adapter is scored on once more; None is not to score it.

    Args:    data, eval_data, data_revision, chat_template: as in the training, see `DataOptions`. Without a
             revision the one counts that was read for the training.
    """

    panel: ClassVar[str] = "Data"

    data: tuple[str, ...] | None = option(
        None, help="Data of the training, to score what counts give.", is_path=True, provenance=False
    )
    eval_data: tuple[str, ...] | None = option(
        None, help="Evaluation data of the training.", is_path=True, provenance=False
    )
    data_revision: str | None = option(
        None,
        help="Revision of datasets of the Hub.",
        shown_default="that of the training",
        provenance=False,
    )
    chat_template: str | None = option(
        None, help="Chat template of the training, where one was given.", is_path=True, provenance=False
    )


def names_of(data: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of sources, where one name may stand for itself."""
    return (data,) if isinstance(data, str) else tuple(data)
