"""A run directory: the documents of one adapter, and the files they name.

runs/bard/
  adapter-spec.json  weight-layout.json  logical-circuit.json  native-circuit.json
  trained-generator.json  frozen-adapter.json
  logical-circuit.qasm  native-circuit.qpy  <sha256>.safetensors
  metrics.jsonl  checkpoints/step-00000100/
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qpa.atomic_files import new_directory, sha256_of, write_file
from qpa.documents import (
    AdapterSpec,
    Attachment,
    Document,
    FrozenAdapter,
    LogicalCircuit,
    NativeCircuit,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import DocumentError, OptionError

D = TypeVar("D", bound=Document)

STAGES: tuple[type[Document], ...] = (
    AdapterSpec,
    WeightLayout,
    LogicalCircuit,
    NativeCircuit,
    TrainedGenerator,
    FrozenAdapter,
)
"""The documents of a run, each the parent of the next."""

_MADE_BY = {TrainedGenerator: "qpa train", FrozenAdapter: "qpa train"}


@dataclass(frozen=True, slots=True)
class DirectoryStore:
    """Files beside the documents of a directory; a `qpa.pipeline.FileStore`."""

    path: Path

    def put(self, name: str, content: bytes) -> Attachment:
        """Write a file whole or not at all; `{sha256}` in the name is replaced by its digest."""
        sha256 = hashlib.sha256(content).hexdigest()
        file = name.replace("{sha256}", sha256)
        write_file(self.path / file, content)
        return Attachment(file=file, sha256=sha256, n_bytes=len(content))

    def describe(self, file: Path) -> Attachment:
        """Return the attachment that names a file already in the directory."""
        return Attachment(
            file=file.relative_to(self.path).as_posix(), sha256=sha256_of(file), n_bytes=file.stat().st_size
        )

    def get(self, attachment: Attachment) -> Path:
        """Return the file's path after checking its length and SHA-256.

        Raises:  DocumentError: the file is missing, truncated or another one.
        """
        path = self.path / attachment.file
        if not path.is_file():
            raise DocumentError(str(path), "a file named by a document", "nothing", "run the pass again")
        n_bytes = path.stat().st_size
        if n_bytes != attachment.n_bytes:
            raise DocumentError(
                str(path), f"{attachment.n_bytes} bytes", f"{n_bytes} bytes", "run the pass again"
            )
        if sha256_of(path) != attachment.sha256:
            raise DocumentError(str(path), f"SHA-256 {attachment.sha256}", "another: the file was changed")
        return path


def check_free(path: Path, *, force: bool) -> None:
    """Check that a run may be made at `path`.

    Raises:  OptionError: something is there already, and it is no run or `force` is not given.
    """
    if path.exists() and not path.is_dir():
        raise OptionError(str(path), "a new directory", "a file")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / AdapterSpec.file_name()).is_file():
        raise OptionError(str(path), "a new or empty directory", "a directory that is no qpa run")
    if not force:
        raise OptionError(str(path), "a new directory", "an existing run", "pass --force to replace it")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Read and write the documents of one run, and refuse stale ones."""

    path: Path

    @property
    def files(self) -> DirectoryStore:
        """Return the store for files beside the documents."""
        return DirectoryStore(self.path)

    @classmethod
    @contextmanager
    def create(cls, path: Path, *, force: bool) -> Iterator[RunDirectory]:
        """Yield a run directory that becomes `path` when the block ends without an error.

        Args:    force: replace a run that is already there. Anything else at `path` is never removed.
        Raises:  OptionError: something is there already.
        """
        check_free(path, force=force)
        with new_directory(path) as work:
            yield cls(work)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:  DocumentError: the directory is missing or holds no run.
        """
        if not (path / AdapterSpec.file_name()).is_file():
            found = "no adapter-spec.json in it" if path.is_dir() else "no such directory"
            raise DocumentError(str(path), "a run directory", found, f"make one: qpa plan --out {path}")
        return cls(path)

    def write(self, document: Document) -> None:
        """Write a document and drop the stages after it, which it makes stale."""
        for later in STAGES[STAGES.index(type(document)) + 1 :]:
            (self.path / later.file_name()).unlink(missing_ok=True)
        write_file(self.path / document.file_name(), document.to_json())

    def has(self, kind: type[Document]) -> bool:
        """Return whether the stage's document is there."""
        return (self.path / kind.file_name()).is_file()

    def read(self, kind: type[D]) -> D:
        """Read one stage and check that it was made from the stages that are there.

        Raises:  DocumentError: missing, edited, newer than this qpa, or stale.
        """
        document = self.read_through(kind)[-1]
        assert isinstance(document, kind)
        return document

    def read_through(self, last: type[Document]) -> tuple[Document, ...]:
        """Read all stages up to and including `last`, oldest first.

        Raises:  DocumentError: one is missing, edited, newer than this qpa, or stale.
        """
        documents: list[Document] = []
        for kind in STAGES[: STAGES.index(last) + 1]:
            document = self._read_file(kind)
            if documents and document.provenance.parent != documents[-1].digest:
                raise DocumentError(
                    str(self.path / kind.file_name()),
                    f"a document made from this {documents[-1].file_name()}",
                    "one made from another",
                    "it is stale: run the passes again (qpa plan --force, qpa train)",
                )
            documents.append(document)
        return tuple(documents)

    def _read_file(self, kind: type[D]) -> D:
        path = self.path / kind.file_name()
        if not path.is_file():
            made_by = _MADE_BY.get(kind, "qpa plan")
            raise DocumentError(str(path), f"a document made by {made_by}", "nothing", f"run {made_by} first")
        return kind.from_json(path.read_bytes(), str(path))
