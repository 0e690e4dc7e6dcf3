"""Manifest: what an exported directory consists of, and from which frozen adapter it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from pydantic import model_validator

from qpa.documents.account import ParameterAccount, with_control_account, with_own_account
from qpa.documents.adapter_spec import AdapterSpec, BaseModelReference
from qpa.documents.base import Attachment, Document, JsonObject, with_parents
from qpa.documents.finding import Finding
from qpa.documents.tensors import Method
from qpa.documents.trained_generator import TrainingResult, with_whole_result
from qpa.errors import DocumentError, one_of
from qpa.registry import Registry

MANIFEST_PATH = "qpa/manifest.json"
MAX_DOCUMENT_BYTES = 16 << 20

D = TypeVar("D", bound=Document)

DtypeName = Literal["float32", "bfloat16", "float16"]


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew float32 only."""
    return content | {"dtype": "float32"}


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 knew LoRA only."""
    return content | {"method": "lora"}


def _upgrade_3(content: JsonObject) -> JsonObject:
    """Version 3 did not count a control's numbers apart from the angles."""
    return with_control_account(with_parents(content))


def _upgrade_5(content: JsonObject) -> JsonObject:
    """Version 5 knew tensors of chunks only, and no contexts."""
    return with_own_account(content) | {"context": None}


class Manifest(Document):
    """The contract of an exported directory.

    Its provenance names the exporter as the pass and the frozen adapter as the parent. It lives at
    `qpa/manifest.json` inside the directory, out of the way of engines that read every file of the
    top level.

    Args:    format: a name in `FORMATS`, which is the exporter's.
             method: the kind of the adapter.
             dtype: the type of the adapter's numbers, or of the merged weights.
             rank: the rank as it is written, with its padding; see `AdapterSpec`.
             files: every other file of the directory, paths relative to it, sorted.
             probe: path of the probe among `files`.
             context: of the adapter, see `FrozenAdapter`.
    """

    kind: ClassVar[str] = "manifest"
    upgrades: ClassVar[tuple[Any, ...]] = (
        _upgrade_1,
        _upgrade_2,
        _upgrade_3,
        with_whole_result,
        _upgrade_5,
    )

    format: str
    method: Method
    dtype: DtypeName
    base: BaseModelReference
    rank: int
    files: tuple[Attachment, ...]
    probe: str
    account: ParameterAccount
    result: TrainingResult
    context: str | None

    @model_validator(mode="after")
    def _verify(self) -> Self:
        names = [entry.file for entry in self.files]
        if names != sorted(set(names)) or self.probe not in names:
            raise ValueError("files must be sorted, unique, and contain the probe")
        if self.format not in FORMATS:
            raise ValueError(f"format must be {one_of(tuple(FORMATS))}")
        return self


class ExportFormat(Protocol):
    """What an export format says of itself by its class alone, before anything is written.

    Class attributes: `name` is the format's, as on the command line and in the manifest; `files` are those
    an export has at least; `engines` read it, by their names in `qpa.documents.verification.ENGINES`;
    `is_file` says that an export is one file without a manifest, and no directory;
    `merges` says that the adapter is added to the base model's weights, so that an export is a model of its
    own; `any_origin` says that directories of this format come from other programs too, without a manifest.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    engines: ClassVar[tuple[str, ...]]
    is_file: ClassVar[bool]
    merges: ClassVar[bool]
    any_origin: ClassVar[bool]

    @classmethod
    def findings(cls, directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
        """Return the broken rules of the format's contract.

        Hostile content gives findings, never an exception.
        """
        ...


FORMATS: Registry[type[ExportFormat]] = Registry(
    "format",
    {
        "lora": "qpa.exporters.formats.lora:ExportLora",
        "peft": "qpa.exporters.formats.peft:ExportPeft",
        "merged": "qpa.exporters.formats.merged:ExportMerged",
        "onnx": "qpa.exporters.formats.onnx:ExportOnnx",
        "onnx-adapter": "qpa.exporters.formats.onnx_adapter:ExportOnnxAdapter",
        "genai": "qpa.exporters.formats.genai:ExportGenai",
        "gguf": "qpa.exporters.formats.gguf:ExportGguf",
        "mlx": "qpa.exporters.formats.mlx:ExportMlx",
        "compact": "qpa.exporters.formats.compact:ExportCompact",
    },
)
"""The formats of `qpa export`."""


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an exported directory.

    Raises:  DocumentError: there is no such directory, it is a run, or has no manifest; or the manifest is
             damaged, or longer than any manifest.
    """
    check_no_run(directory, "a directory that qpa export wrote")
    advice = "name a directory that qpa export wrote, or check one of another origin with qpa verify `static`"
    return read_in_export(directory, MANIFEST_PATH, Manifest, advice)


def check_no_run(directory: Path, expected: str) -> None:
    """Check that a directory is there, and is not the run that an export is made from.

    Args:    expected: the words of the error.
    Raises:  DocumentError: it is not there, or is a file or a run.
    """
    if not directory.is_dir():
        raise DocumentError(str(directory), expected, "a file" if directory.exists() else "no such directory")
    is_run = (directory / AdapterSpec.file_name()).is_file()
    if is_run and not (directory / MANIFEST_PATH).is_file():
        advice = f"export it first: qpa export {directory} `out` ..."
        raise DocumentError(str(directory), expected, "a run", advice)


def read_in_export(directory: Path, name: str, kind: type[D], advice: str) -> D:
    """Return a document that lies in an exported directory, which may be anybody's.

    Args:    advice: what to do where it cannot be read.
    Raises:  DocumentError: there is none, it is damaged, or longer than `MAX_DOCUMENT_BYTES`.
    """
    path = directory / name
    try:
        n_bytes = path.stat().st_size
        content = path.read_bytes() if n_bytes <= MAX_DOCUMENT_BYTES else b""
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise DocumentError(str(path), f"the {kind.kind} of an export", found, advice) from error
    if n_bytes > MAX_DOCUMENT_BYTES:
        raise DocumentError(str(path), f"at most {MAX_DOCUMENT_BYTES} bytes", f"{n_bytes} bytes")
    try:
        return kind.from_json(content, str(path))
    except (ValueError, RecursionError) as error:
        raise DocumentError(str(path), f"a {kind.kind}", f"{type(error).__name__}: {error}") from error
