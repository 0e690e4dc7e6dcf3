"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpa.errors import DirectoryError

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755
TEMPORARY_PREFIX = ".incomplete-"


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read a block at a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked_directory(directory: Path, expected: str, found: str) -> Iterator[None]:
    """Hold a directory for one process.

    Args:    expected, found: what to say where another process holds it.
    Raises:  DirectoryError: another process does.
    """
    with (directory / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DirectoryError(str(directory), expected, found) from error
        try:
            yield
        finally:
            Path(stream.name).unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place.

    Raises:  OSError: the disk is full or read-only; `path` is then as it was before.
    Source:  ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(FILE_MODE)
        Path(name).replace(path)
        _sync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    A process killed inside the block leaves only a directory whose name starts with
    `TEMPORARY_PREFIX`. Files get mode 0644 and are synced before the rename. An existing `path`
    is replaced as late as possible.

    Raises:  OSError: the disk is full or read-only; `path` is then as it was before.
    Source:  ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY_PREFIX))
    try:
        yield work
        _settle(work)
        _swap(work, path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _settle(directory: Path) -> None:
    directory.chmod(DIRECTORY_MODE)
    for entry in directory.rglob("*"):
        entry.chmod(DIRECTORY_MODE if entry.is_dir() else FILE_MODE)
        if entry.is_file():
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY_PREFIX))
    try:
        path.rename(old / path.name)
        try:
            work.rename(path)
        except BaseException:
            (old / path.name).rename(path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
