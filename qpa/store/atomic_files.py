"""Files and directories that appear whole or not at all.

Rules:
1. What is not whole yet has a name that starts with `TEMPORARY_PREFIX`, which no other program uses. Its
   maker holds a lock on it until it has its own name; the kernel lets go of a process's locks however the
   process ends.
2. Whoever makes a new file or directory first removes from the same directory what has such a name and is
   held by nobody: killed processes left it. A directory that was about to be replaced gets its name back.
3. A maker holds no lock between making a file and locking it. Where another process takes the file for a
   leftover in that moment and removes it, the maker makes a new one.
4. What cannot be locked or removed stays: files of another user, links, and everything on a file system
   without locks. Machines that write to one directory at once need a file system whose locks they share.

Source: ours; flock(2), of which Linux keeps one for each opening of a file or directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from qpa.errors import DirectoryError
from qpa.store.disk_space import disk_full, missing_room, room_for

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755
TEMPORARY_PREFIX = ".qpa-incomplete-"
_REPLACED_PREFIX = f"{TEMPORARY_PREFIX}replaced-"


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read a block at a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked_directory(directory: Path, expected: str, found: str) -> Iterator[None]:
    """Hold a directory for one process, which may replace the directory meanwhile.

    Args:    expected, found: the words of the error where another process holds it.
    Raises:  DirectoryError: another process holds it.
             DiskFullError: there is no room for the lock's file.
    """
    lock = directory / ".lock"
    with _open_lock(lock, expected, found) as stream:
        try:
            yield
        finally:
            if _is_still_at(lock, stream.fileno()):  # otherwise it is another process's, in a new directory
                lock.unlink()


def _open_lock(lock: Path, expected: str, found: str) -> TextIO:
    """Return the lock's file, which this process holds, and which is at its path.

    A process that lets go of the lock removes its file: who opened that file before, and locked it after,
    would hold a lock that nobody else meets.
    """
    while True:
        with room_for(lock):
            stream = lock.open("w")
        with ExitStack() as unless_held:
            unless_held.enter_context(stream)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DirectoryError(str(lock.parent), expected, found) from error
            if _is_still_at(lock, stream.fileno()):
                unless_held.pop_all()
                return stream


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place.

    Raises:  DiskFullError: the disk is full; `path` is then as it was before.
             OSError: the file cannot be written for another reason; `path` is as it was before, too.
    Source:  ours.
    """
    with room_for(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        work, handle = _claim_file(path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
                work.chmod(FILE_MODE)
                work.replace(path)  # before the stream is closed, which lets go of the lock
            _sync_directory(path.parent)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


@contextmanager
def new_directory(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    A process killed inside the block leaves only a directory whose name starts with
    `TEMPORARY_PREFIX`. Files get mode 0644 and are synced before the rename. An existing `path`
    is replaced as late as possible.

    Args:    keep_existing: where another process has made `path` meanwhile, drop the new one instead.
    Raises:  DiskFullError: the disk is full; `path` is then as it was before.
             OSError: it cannot be written for another reason; `path` is as it was before, too.
    Source:  ours.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        work, handle = _claim_directory(path.parent, TEMPORARY_PREFIX)
    try:
        yield work
        _settle(work)
        if keep_existing:
            _rename_unless_there(work, path)
        else:
            _swap(work, path)
        _sync_directory(path.parent)
    except BaseException as error:
        missing = missing_room(error, work, path)
        shutil.rmtree(work, ignore_errors=True)
        if missing is not None:
            raise disk_full(*missing, error) from error
        raise
    finally:
        os.close(handle)


def check_absent(path: Path) -> None:
    """Check that there is nothing at the place of a new directory.

    Raises:  DirectoryError: there is something.
    """
    if path.exists() or path.is_symlink():
        raise DirectoryError(str(path), "a new directory", "one that is there", "choose another name")


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary files and directories that no living process holds.

    What cannot be removed stays, and nothing with another name is looked at.
    """
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    # Without following a link, and without waiting for somebody to write to a pipe.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_still_at(path, handle):
            return
        if not path.is_dir():
            path.unlink()
            return
        if path.name.startswith(_REPLACED_PREFIX):
            _put_back(path)
        shutil.rmtree(path)
    finally:
        os.close(handle)


def _put_back(replaced: Path) -> None:
    """Give a directory its name back where the process that was replacing it was killed half-way."""
    for entry in replaced.iterdir():
        if not (place := replaced.parent / entry.name).exists():
            entry.rename(place)


def _claim_file(parent: Path) -> tuple[Path, int]:
    """Return a new temporary file and its handle, which holds it."""
    while True:
        handle, name = tempfile.mkstemp(dir=parent, prefix=TEMPORARY_PREFIX)
        if _holds(handle, Path(name)):
            return Path(name), handle
        os.close(handle)


def _claim_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new temporary directory and a handle that holds it."""
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            if _holds(handle, path):
                return path, handle
            os.close(handle)


def _holds(handle: int, path: Path) -> bool:
    """Lock what was just made; return False where another process has removed it before."""
    with suppress(OSError):  # a file system without locks, on which nobody can take it for a leftover
        fcntl.flock(handle, fcntl.LOCK_EX)
    return _is_still_at(path, handle)


def _is_still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


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


def _rename_unless_there(work: Path, path: Path) -> None:
    try:
        work.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(work)


def _swap(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
        return
    old, handle = _claim_directory(path.parent, _REPLACED_PREFIX)
    try:
        path.rename(old / path.name)
        try:
            work.rename(path)
        except BaseException:
            (old / path.name).rename(path)
            raise
    finally:
        if path.exists():  # otherwise the old one is still in there, and is put back when it can be
            shutil.rmtree(old, ignore_errors=True)
        os.close(handle)
