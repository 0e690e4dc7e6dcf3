"""Manifest: what an exported directory consists of, and from which frozen adapter it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.account import ParameterAccount, with_control_account
from qpa.documents.adapter_spec import BaseModelReference, Method
from qpa.documents.base import Attachment, Document, JsonObject
from qpa.documents.trained_generator import TrainingResult
from qpa.errors import DocumentError

MANIFEST_PATH = "qpa/manifest.json"
MAX_MANIFEST_BYTES = 16 << 20

DtypeName = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["lora", "peft", "merged", "onnx", "onnx-adapter", "genai", "gguf", "mlx"]


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew float32 only."""
    return content | {"dtype": "float32"}


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 knew LoRA only."""
    return content | {"method": "lora"}


def _upgrade_3(content: JsonObject) -> JsonObject:
    """Version 3 did not tell a control's numbers from angles."""
    return with_control_account(content)


class Manifest(Document):
    """The contract of an exported directory.

    Its provenance names the exporter as the pass and the frozen adapter as the parent. It lives at
    `qpa/manifest.json` inside the directory, out of the way of engines that read every file of the
    top level.

    Args:    format: the exporter's name.
             method: kind of the adapter.
             dtype: of the adapter's numbers, or of the merged weights.
             rank: as written, padding included; see `AdapterSpec`.
             files: every other file of the directory, paths relative to it, sorted.
             probe: path of the probe among `files`.
    """

    kind: ClassVar[str] = "manifest"
    upgrades: ClassVar[tuple[Any, ...]] = (_upgrade_1, _upgrade_2, _upgrade_3)

    format: ExportFormat
    method: Method
    dtype: DtypeName
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
        return self


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an exported directory.

    Raises:  DocumentError: there is none, it is damaged, or longer than any manifest.
    """
    path = directory / MANIFEST_PATH
    try:
        n_bytes = path.stat().st_size
        content = path.read_bytes() if n_bytes <= MAX_MANIFEST_BYTES else b""
    except OSError as error:
        found = error.strerror or type(error).__name__
        advice = "a directory of another origin can be checked with qpa verify --static"
        raise DocumentError(str(path), "the manifest of an export", found, advice) from error
    if n_bytes > MAX_MANIFEST_BYTES:
        raise DocumentError(str(path), f"at most {MAX_MANIFEST_BYTES} bytes", f"{n_bytes} bytes")
    try:
        return Manifest.from_json(content, str(path))
    except (ValueError, RecursionError) as error:
        raise DocumentError(str(path), "a manifest", f"{type(error).__name__}: {error}") from error
