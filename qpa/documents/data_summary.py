"""What a training's data was: how many rows and tokens there are, and what was cut or left out."""

from __future__ import annotations

from qpa.documents.base import Record


class HubDataset(Record):
    """A dataset of the Hub.

    Args:    name: as it was asked for, with its configuration and split.
             revision: the commit that was read; None where it is not known.
    """

    name: str
    revision: str | None


class SplitSummary(Record):
    """The rows of a split.

    Args:    n_rows: rows that the model sees; packed ones hold several.
             n_unpacked: rows before they were packed.
             n_tokens: tokens in them.
             n_loss_tokens: tokens that are predicted: those with a label, but no row's first.
             n_cut_rows, n_cut_tokens: rows longer than `max_length`, and their tokens beyond it.
             n_lost_rows: rows left out because all that carries a loss was cut.
             n_silent_rows: rows left out because nothing in them carries a loss, such as messages without
             an assistant's.
             n_empty_rows: rows left out because their text or answer is empty.
    """

    n_rows: int
    n_unpacked: int
    n_tokens: int
    n_loss_tokens: int
    n_cut_rows: int
    n_cut_tokens: int
    n_lost_rows: int
    n_silent_rows: int
    n_empty_rows: int


class DataSummary(Record):
    """Both splits.

    Args:    shape: a name in `qpa.training.data.shapes.SHAPES`, or "stream" for text files.
             hub: the datasets of the Hub that were read.
             chat_template: "sha256:" and the SHA-256 of the chat template; None where none was used.
    """

    shape: str
    hub: tuple[HubDataset, ...]
    chat_template: str | None
    training: SplitSummary
    evaluation: SplitSummary
