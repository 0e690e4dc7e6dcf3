"""A run directory: the documents of one adapter, and the files they name.

runs/bard/
  adapter-spec.json  weight-layout.json  logical-circuit.json  native-circuit.json
  trained-generator.json  measurement.json  frozen-adapter.json
  logical-circuit.qasm  native-circuit.qpy  <sha256>.safetensors
  configuration.json  metrics.jsonl  report.html  checkpoints/step-00000100/
  tensorboard/
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qpa.documents import AdapterSpec, Attachment, Document, Provenance
from qpa.errors import DirectoryError, DocumentError, StaleError
from qpa.pipeline.stages import STAGES, Stage, ancestors, descendants, stages_through
from qpa.store.atomic_files import (
    TEMPORARY_PREFIX,
    locked_directory,
    new_directory,
    remove_leftovers,
    sha256_of,
    write_file,
)

D = TypeVar("D", bound=Document)

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
REPORT = "report.html"
TENSORBOARD = "tensorboard"

_ARRAYS = r"[0-9a-f]{64}\.(?:safetensors|qpy|device)"
_TEMPORARY = rf"{re.escape(TEMPORARY_PREFIX)}.*"
_OWN_FILES = (
    r"logical-circuit\.qasm|native-circuit\.(?:qpy|device)|(?:selection|configuration)\.json|metrics\.jsonl|"
    rf"report\.html|\.lock|{_ARRAYS}|{_TEMPORARY}"
)


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(root.glob("step-*")) if root.is_dir() else []


def older_digests(directory: Path, documents: Iterable[Document]) -> dict[str, str]:
    """Return the digests in the files of documents of older schemas, by those that they have once upgraded.

    What was made before qpa knew the newer schema names the former.
    """
    found: dict[str, str] = {}
    for document in documents:
        path = directory / document.file_name()
        written = str(json.loads(path.read_bytes())["digest"]) if path.is_file() else document.digest
        if written != document.digest:
            found[document.digest] = written
    return found


def has_parents(made: Provenance, parents: Collection[str], older: Mapping[str, str]) -> bool:
    """Return whether a document was made from others.

    Args:    parents: the digests of these.
             older: what they were called before, see `older_digests`.
    """
    return all(parent in made.parents or older.get(parent) in made.parents for parent in parents)


@dataclass(frozen=True, slots=True)
class DirectoryStore:
    """Files beside the documents of a directory; a `qpa.pipeline.pass_protocol.FileStore`."""

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
        path = self.path_of(attachment)
        if sha256_of(path) != attachment.sha256:
            raise DocumentError(str(path), f"SHA-256 {attachment.sha256}", "another: the file was changed")
        return path

    def path_of(self, attachment: Attachment) -> Path:
        """Return the file's path after checking its length alone.

        Raises:  DocumentError: the file is missing or truncated.
        """
        path = self.path / attachment.file
        if not path.is_file():
            raise DocumentError(str(path), "a file named by a document", "nothing", "run the pass again")
        n_bytes = path.stat().st_size
        if n_bytes != attachment.n_bytes:
            raise DocumentError(
                str(path), f"{attachment.n_bytes} bytes", f"{n_bytes} bytes", "run the pass again"
            )
        return path

    def drop_from(self, kind: type[Document], *, keep_first: bool = False) -> None:
        """Remove a document and all that is made from it, and the page that shows them.

        Args:    keep_first: keep the document itself.
        """
        (self.path / REPORT).unlink(missing_ok=True)
        for stale in (*(() if keep_first else (kind,)), *descendants(kind)):
            (self.path / stale.file_name()).unlink(missing_ok=True)

    def drop_unnamed(self) -> None:
        """Remove the files that no document of the directory names any more.

        They are arrays, circuits and devices that are named by their digest. Every JSON file counts as a
        document: it may be a copy. Where a file cannot be read or removed, what is left stays until the next
        call.
        """
        with suppress(OSError):
            arrays = [
                file
                for file in self.path.iterdir()
                if re.fullmatch(_ARRAYS, file.name) and file.is_file() and not file.is_symlink()
            ]
            named = (
                self._named_arrays() if arrays else set()
            )  # a plan, which has none, reads no document again
            for file in arrays:
                if file.name not in named:
                    file.unlink()

    def _named_arrays(self) -> set[str]:
        texts = (file.read_bytes() for file in self.path.glob("*.json") if file.is_file())
        return {name.decode() for text in texts for name in re.findall(_ARRAYS.encode(), text)}


def check_free(path: Path, *, force: bool) -> None:
    """Check that a run may be made at `path`.

    Raises:  DirectoryError: `path` is a file; it is a directory that is no run, or holds anything that is
             not a run's own, with or without `force`; or it is a run, and `force` is not given.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise DirectoryError(str(path), "a new directory", "a file")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not _is_run(path):
        raise DirectoryError(str(path), "a new or empty directory", "a directory that is no qpa run")
    if foreign := sorted(entry.name for entry in path.iterdir() if not _is_own(entry)):
        raise DirectoryError(str(path), "a directory with nothing but a qpa run", f"{foreign[0]} in it")
    if not force:
        raise DirectoryError(str(path), "a new directory", "an existing run", "pass `force` to replace it")


def _is_run(path: Path) -> bool:
    try:
        content = json.loads((path / AdapterSpec.file_name()).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and str(content.get("schema")).startswith(f"qpa.{AdapterSpec.kind}/")


def _is_own(entry: Path) -> bool:
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return entry.name in (CHECKPOINTS, TENSORBOARD) or entry.name.startswith(TEMPORARY_PREFIX)
    stages = {stage.document.file_name() for stage in STAGES}
    return entry.name in stages or re.fullmatch(_OWN_FILES, entry.name) is not None


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
        Raises:  DirectoryError: something is there already, or a run that another process holds.
        """
        remove_leftovers(path.parent)  # which may put a run back
        check_free(path, force=force)
        is_replaced = _is_run(path)
        with cls(path).locked() if is_replaced else nullcontext(), new_directory(path) as work:
            yield cls(work)
            if not is_replaced:
                check_free(path, force=False)  # another command may have made a run meanwhile, and use it

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:  DocumentError: the directory is missing or holds no run.
        """
        if not (path / AdapterSpec.file_name()).is_file():
            found = "no adapter-spec.json in it" if path.is_dir() else "no such directory"
            raise DocumentError(str(path), "a run directory", found, f"make one: qpa plan `out` {path}")
        return cls(path)

    @classmethod
    def at(cls, path: Path) -> RunDirectory:
        """Return the run at a path, or a new directory that is to become one.

        Raises:  DirectoryError: there is a file, or a directory with anything but a run.
        """
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise DirectoryError(str(path), "a run, or a new directory", "a file")
        if path.is_dir() and not _is_run(path) and not all(map(_is_own, path.iterdir())):
            raise DirectoryError(str(path), "a run, or a new directory", "a directory that is no qpa run")
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def write(self, document: Document) -> None:
        """Write a document and drop what was made from the one before, which is stale now.

        Arrays that nothing names any more go last: whenever this is killed, no document lacks its own.
        """
        write_file(self.path / document.file_name(), document.to_json())
        self.files.drop_from(type(document), keep_first=True)
        self.files.drop_unnamed()

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

    def written_digest(self, kind: type[Document]) -> str:
        """Return the digest that stands in a stage's file, which that of an upgraded document is not."""
        return self._read_file(kind)[1]

    def read_through(self, last: type[Document]) -> tuple[Document, ...]:
        """Read a stage and all stages before it that are there, oldest first.

        A run of an older qpa lacks stages that this one has; what it has is checked all the same: every
        document was made from one that is here.

        Raises:  DocumentError: one is missing, edited, newer than this qpa, or stale.
        """
        documents: list[Document] = []
        digests: set[str] = set()
        missing: Stage | None = None
        needed = {last, *ancestors(last)}
        for stage in stages_through(last):
            if not self.has(stage.document):
                missing = missing or (stage if stage.document in needed else None)
                continue
            document, digest = self._read_file(stage.document)
            if not digests.issuperset(document.provenance.parents):
                if stage.document not in needed:
                    continue  # it is stale, and nothing here is made from it
                raise self._missing(missing) if missing else self._stale(stage)
            documents.append(document)
            # A document of an older schema has one digest in its file and another once it is upgraded.
            digests |= {digest, document.digest}
        if missing and not self.has(last):
            raise self._missing(missing)
        return tuple(documents)

    def _missing(self, stage: Stage) -> StaleError:
        path = self.path / stage.document.file_name()
        expected, advice = f"a document made by {stage.made_by}", f"run {stage.made_by} first"
        return StaleError(str(path), expected, "nothing", advice)

    def _stale(self, stage: Stage) -> StaleError:
        path = self.path / stage.document.file_name()
        source = "run" if stage.made_from is None else stage.made_from.file_name()
        expected = f"a document made from this {source}"
        advice = "it is stale: run the passes again (qpa plan `force`, qpa train)"
        return StaleError(str(path), expected, "one made from another", advice)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one process.

        Raises:  DirectoryError: another process holds it.
        """
        expected, found = "a run that no command uses", "one that another qpa train, transpile or plan uses"
        with locked_directory(self.path, expected, found):
            yield

    def _read_file(self, kind: type[D]) -> tuple[D, str]:
        path = self.path / kind.file_name()
        content = path.read_bytes()
        return kind.from_json(content, str(path)), str(json.loads(content)["digest"])
