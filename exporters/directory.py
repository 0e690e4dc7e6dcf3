"""What all exports have in common: a directory that appears whole, with a probe and a manifest.

Rules:
1. The directory appears whole or not at all; qpa/manifest.json is written last.
2. It holds the probe, so that any engine's answers can be compared with the live model's.
3. Only the frozen adapter and the exporter's options decide the bytes: no time, no path of the output.
4. An existing directory is replaced on request only, and only if it holds nothing but an export of qpa.

Source: ours.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from qpa.adapters.experts import has_experts
from qpa.documents import (
    MANIFEST_PATH,
    METHOD_NAMES,
    Attachment,
    FrozenAdapter,
    Manifest,
    Method,
    read_manifest,
)
from qpa.documents.manifest import DtypeName, ExportFormat
from qpa.errors import DocumentError, ExportError, OptionError, one_of
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.atomic_files import new_directory, sha256_of
from qpa.store.tensor_file import Array, TensorPlan, write_tensors

PROBE_FILE = "qpa/probe.safetensors"
CARD_FILE = "README.md"

FORMATS_FOR: dict[Method, tuple[ExportFormat, ...]] = {
    "lora": ("lora", "merged", "onnx", "onnx-adapter", "genai", "gguf", "mlx"),
    "dora": ("peft", "merged", "onnx"),
    "ia3": ("peft", "merged", "onnx"),
    "prefix": ("peft", "onnx"),
    "ffa": ("onnx",),
}
"""The formats that carry each kind of adapter, the plainest first."""


class Exporter(ABC):
    """A frozen dataclass whose fields are its options, of which `dtype` is one.

    Class attributes: `name` is the format's, as on the command line and in the manifest; `dtypes` are the
    types it can write; `carries_all`: of a LoRA on experts of a mixture, or on an embedding, too.
    """

    __slots__ = ()

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    carries_all: ClassVar[bool] = False
    dtype: str
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def emit(
        self, frozen: FrozenAdapter, out: Path, context: PassContext, *, force: bool = False
    ) -> Manifest:
        """Write an export whole or not at all.

        Args:    out: a new or empty directory.
                 context: its file store holds the adapter's arrays and probe.
                 force: replace an export of qpa that is already there. A directory that is anything
                 else, or holds anything else, is never removed.
        Returns: the manifest, as it stands in the directory.
        Raises:  OptionError: the format does not have the type.
                 ExportError: the format cannot carry this adapter or its kind, numbers that are not
                 finite, arrays that are not the document's, an output that is in the way or cannot be
                 written.
                 DocumentError: the arrays or the probe are missing or damaged.
        """
        self._check_dtype()
        self._check_method(frozen)
        self.check(frozen)
        check_output(out, force=force)
        probe = context.files.get(frozen.probe).read_bytes()
        try:
            with new_directory(out) as work, _verified(frozen.arrays, context):
                directory = ExportDirectory(work)
                rank = self.write(frozen, context, directory)
                directory.write(PROBE_FILE, probe)
                manifest = _manifest(self, frozen, rank, directory.files, context)
                (work / MANIFEST_PATH).write_bytes(manifest.to_json())
                check_output(out, force=force)  # again: this may have taken minutes
        except OSError as error:
            found = error.strerror or type(error).__name__
            other = error.filename if error.filename and str(out.parent) not in str(error.filename) else None
            expected = "a file that can be read" if other else "a directory that can be written"
            raise ExportError(str(other or out), expected, found) from error
        return manifest

    def _check_dtype(self) -> None:
        if self.dtype not in self.dtypes:
            format_ = f" with --format {self.name}" if len(self.dtypes) == 1 else ""
            raise OptionError("--dtype", one_of(self.dtypes) + format_, self.dtype)

    def _check_method(self, frozen: FrozenAdapter) -> None:
        if self.name not in (formats := FORMATS_FOR[frozen.method]):
            carried = [METHOD_NAMES[m] for m, names in FORMATS_FOR.items() if self.name in names]
            found = METHOD_NAMES[frozen.method]
            raise ExportError(f"--format {self.name}", one_of(carried), found, f"use {one_of(formats)}")
        others = "experts" if has_experts(frozen.modules) else ", ".join(frozen.embeddings)
        if others and not self.carries_all:
            expected, advice = "an adapter on linear layers of their own", "use lora, merged or onnx"
            raise ExportError(f"--format {self.name}", expected, f"one on {others}", advice)

    def check(self, frozen: FrozenAdapter) -> None:  # noqa: B027 - most formats have nothing to refuse
        """Refuse, before anything is written, what the format cannot carry or engines serve wrongly.

        Raises:  ExportError: with the reason, and the format that can.
        """

    @abstractmethod
    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write the format's own files, the model card included.

        Returns: the rank that was written.
        Raises:  ExportError, DocumentError: something is wrong with the arrays or the base model.
        """


@dataclass(frozen=True, slots=True)
class BaseModelExporter(Exporter):
    """An exporter that reads the base model.

    Args:    dtype: of what is written.
             model: where the base model is now; None for where the adapter says.
             trust_remote_code: the user allows the model's own Python code to run, now.
    """

    dtype: str = "float32"
    model: str | None = field(default=None, metadata={"provenance": False})
    trust_remote_code: bool = field(default=False, metadata={"provenance": False})


@contextmanager
def _verified(arrays: Attachment, context: PassContext) -> Iterator[None]:
    """Check a file's digest in a thread while it is read; what was made of it counts only if that is right.

    Raises:  DocumentError: the file was changed, whatever else went wrong because of it.
    """
    beside = ThreadPoolExecutor(1)
    verified = beside.submit(context.files.get, arrays)
    try:
        yield
    except Exception:
        verified.result()
        raise
    finally:
        beside.shutdown(wait=False)
    verified.result()


class ExportDirectory:
    """The files of an export while it is being made.

    Args:    path: of the temporary directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Attachment] = []

    def write(self, name: str, content: bytes) -> None:
        """Write a file; a name may have folders."""
        self._new(name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.files.append(Attachment(file=name, sha256=sha256, n_bytes=len(content)))

    def write_tensors(
        self,
        name: str,
        plans: Iterable[TensorPlan],
        read: Callable[[str], Array],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a safetensors file, see `qpa.store.tensor_file.write_tensors`."""
        written = write_tensors(self._new(name), plans, read, metadata)
        self.files.append(written.model_copy(update={"file": name}))

    def copy(self, name: str, source: Path) -> None:
        """Copy a file, whatever its size."""
        shutil.copyfile(source, self._new(name))
        self.take(name)

    def take(self, name: str) -> None:
        """List a file that a library has written below `path`."""
        path = self.path / name
        self.files.append(Attachment(file=name, sha256=sha256_of(path), n_bytes=path.stat().st_size))

    def _new(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _manifest(
    exporter: Exporter, frozen: FrozenAdapter, rank: int, files: list[Attachment], context: PassContext
) -> Manifest:
    return Manifest(
        provenance=context.provenance(exporter, frozen),
        format=cast(ExportFormat, exporter.name),
        method=frozen.method,
        dtype=cast(DtypeName, exporter.dtype),
        base=frozen.base,
        rank=rank,
        files=tuple(sorted(files, key=lambda entry: entry.file)),
        probe=PROBE_FILE,
        account=frozen.account,
        result=frozen.result,
    )


def check_output(out: Path, *, force: bool) -> None:
    """Check that an export may be written to `out`.

    Raises:  ExportError: a file; an export of qpa without `force`; or a directory that is none, or
             holds files that are not the export's own, with or without `force`.
    """
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ExportError(str(out), "a new directory", "a file")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        manifest = read_manifest(out)
    except DocumentError as error:
        raise ExportError(
            str(out), "a new or empty directory", "a directory that is no qpa export"
        ) from error
    own = {entry.file for entry in manifest.files} | {MANIFEST_PATH}
    present = {entry.relative_to(out).as_posix() for entry in out.rglob("*") if not entry.is_dir()}
    if foreign := sorted(present - own):
        raise ExportError(str(out), "a directory with nothing but a qpa export", f"{foreign[0]} in it")
    if not force:
        raise ExportError(str(out), "a new directory", "an existing export", "pass --force to replace it")
