"""Manifest: what an exported directory consists of, and from which frozen adapter it came."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.adapter_spec import BaseModelReference
from qpa.documents.base import Attachment, Document
from qpa.documents.trained_generator import TrainingResult
from qpa.documents.weight_layout import ParameterAccount

MANIFEST_PATH = "qpa/manifest.json"


class Manifest(Document):
    """The contract of an exported directory.

    Its provenance names the exporter as the pass and the frozen adapter as the parent. It lives at
    `qpa/manifest.json` inside the directory, out of the way of engines that read every file of the
    top level.

    Args:    format: the exporter's name.
             files: every other file of the directory, paths relative to it, sorted.
             probe: path of the probe among `files`.
    """

    kind: ClassVar[str] = "manifest"

    format: Literal["lora"]
    base: BaseModelReference
    rank: int
    files: tuple[Attachment, ...]
    probe: str
    account: ParameterAccount
    result: TrainingResult

    @model_validator(mode="after")
    def _verify(self) -> Self:
        names = [entry.file for entry in self.files]
        if names != sorted(set(names)) or self.probe not in names:
            raise ValueError("files must be sorted, unique, and contain the probe")
        if any(name.startswith("/") or ".." in name.split("/") for name in names):
            raise ValueError("files must lie inside the directory")
        return self
