"""What to say when a disk is full: which file, how much room it needs, and how much there is."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpa.errors import DiskFullError, QpaError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own


@contextmanager
def room_for(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Name the file that a block writes, and its size, where the disk has no room for it.

    Args:    n_bytes: at least what the file needs; 0 where nobody knows.
    Raises:  DiskFullError: in place of the system's error, or of a library's that says less.
    """
    try:
        yield
    except QpaError:
        raise
    except Exception as error:
        if not _is_full(error) and not (_says_nothing(error) and _lacks_room(path, n_bytes)):
            raise
        raise disk_full(path, n_bytes, error) from error


def missing_room(error: BaseException, work: Path, path: Path) -> tuple[Path, int] | None:
    """Return what the disk had no room for while a directory was made, and how much it needs.

    To be called before the directory is removed: what is in it will need its room again.

    Args:    error: what ended the making.
             work: the directory under the name it has meanwhile; `path` is the one it was to have.
    Returns: the file below `path`, or `path` where the error names none, and the number of bytes with those
             of the files beside it; None for an error of another kind, or with a file elsewhere.
    """
    if isinstance(error, DiskFullError):
        failed, n_bytes = error.path.absolute(), error.n_bytes
    elif _is_full(error):
        failed = Path(getattr(error, "filename", None) or work).absolute()
        n_bytes = _n_bytes(failed)
    else:
        return None
    root = work.absolute()
    if not failed.is_relative_to(root):
        return None
    n_beside = sum(_n_bytes(file) for file in root.rglob("*") if file != failed)
    return path / failed.relative_to(root), n_bytes + n_beside


def disk_full(path: Path, n_bytes: int, error: BaseException) -> DiskFullError:
    """Return the error for a file that the disk had no room for, with the room that there is now.

    Args:    error: the system's, a library's, or one that knew less.
    """
    if isinstance(error, DiskFullError):
        reason = error.reason
    else:
        reason = os.strerror(getattr(error, "errno", None) or errno.ENOSPC)
    return DiskFullError(path, n_bytes, _free_bytes(path), reason)


def _is_full(error: BaseException) -> bool:
    """Return whether the system says so, or a library in Rust's words: tokenizers raises Exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return f"(os error {errno.ENOSPC})" in str(error)


def _says_nothing(error: Exception) -> bool:
    """Return whether an error may stand for a full disk: numpy gives no errno, onnxruntime RuntimeError."""
    return isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None)


def _lacks_room(path: Path, n_bytes: int) -> bool:
    return _n_bytes(path) + _free_bytes(path) < n_bytes


def _free_bytes(path: Path) -> int:
    """Return the bytes that are free for the user where a path is or would be."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def _n_bytes(path: Path) -> int:
    """Return the room that a file takes, in whole blocks; 0 where there is none, or other names share it."""
    status = path.lstat() if path.is_file() else None
    if status is None or status.st_nlink > 1:
        return 0
    return max(status.st_size, _BLOCK_BYTES * status.st_blocks)
