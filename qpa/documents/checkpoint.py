"""Checkpoint: where a training stands, written last into its directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from qpa.documents.base import Attachment, Document, JsonObject, with_parents


class Checkpoint(Document):
    """One complete checkpoint.

    Its provenance is train-generator's, with the options, seed and parent it trains with.

    Args:    step: optimizer steps done.
             lr: learning rate of the next step.
             data_digest: of the tokenised splits, see `qpa.training.evaluation`.
             files: every other file of the directory.
    """

    kind: ClassVar[str] = "checkpoint"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (with_parents,)

    step: int
    lr: float
    data_digest: str
    files: tuple[Attachment, ...]
