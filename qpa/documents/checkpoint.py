"""Checkpoint: how far a training has come; the document is written last into a checkpoint's directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from qpa.documents.base import Attachment, Document, JsonObject, with_parents


class Checkpoint(Document):
    """One complete checkpoint.

    Its provenance is that of train-generator, with the options, the seed and the parents of the training.

    Args:    step: the number of optimizer steps that are done.
             lr: the learning rate of the next step.
             data_digest: the digest of the tokenised splits, see `qpa.training.evaluation`.
             files: every other file of the directory.
    """

    kind: ClassVar[str] = "checkpoint"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (with_parents,)

    step: int
    lr: float
    data_digest: str
    files: tuple[Attachment, ...]
