"""Checkpoint: how far a training has come; the document is written last into a checkpoint's directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from qpa.documents.base import Attachment, Document, JsonObject, with_parents
from qpa.documents.shared_basis import ChosenBank


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 knew one bank of directions, which was the first where the plan had a basis."""
    return content | {"bank": None}


class Checkpoint(Document):
    """One complete checkpoint.

    Its provenance is that of train-generator, with the options, the seed and the parents of the training.

    Args:    step: the number of optimizer steps that are done.
             lr: the learning rate of the next step.
             data_digest: the digest of the tokenised splits, see `qpa.training.evaluation`.
             files: every other file of the directory.
             bank: see `TrainedGenerator`.
    """

    kind: ClassVar[str] = "checkpoint"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (with_parents, _upgrade_2)

    step: int
    lr: float
    data_digest: str
    files: tuple[Attachment, ...]
    bank: ChosenBank | None
