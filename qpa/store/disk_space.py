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
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own blocks are


@contextmanager
def room_for(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Raise an error that names the file and its size where the disk has no room for what a block writes.

    Args:    n_bytes: the least that the file needs; 0 where that is not known.
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

    Call this before the directory is removed, since the files in it will need their room again.

    Args:    error: the exception that ended the making of the directory.
             work: the directory under its temporary name; `path` is the name it was to have.
    Returns: the file below `path`, or `path` where the error names none, and the number of bytes that it
             and the files beside it need; None where the error is of another kind, or names a file
             elsewhere.
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

    Args:    error: an error of the system or of a library, or a DiskFullError that knew less.
    """
    if isinstance(error, DiskFullError):
        reason = error.reason
    else:
        reason = os.strerror(getattr(error, "errno", None) or errno.ENOSPC)
    return DiskFullError(path, n_bytes, _free_bytes(path), reason)


def _is_full(error: BaseException) -> bool:
    """Return whether an error of the system, or of a Rust library such as tokenizers, means a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return f"(os error {errno.ENOSPC})" in str(error)


def _says_nothing(error: Exception) -> bool:
    """Return whether an error may mean a full disk: numpy's has no errno, onnxruntime's is a RuntimeError."""
    return isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None)


def _lacks_room(path: Path, n_bytes: int) -> bool:
    return _n_bytes(path) + _free_bytes(path) < n_bytes


def _free_bytes(path: Path) -> int:
    """Return the bytes that are free for the user where a path is or would be."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def _n_bytes(path: Path) -> int:
    """Return the room that a file takes, in whole blocks; 0 where there is no file, or it has other names."""
    status = path.lstat() if path.is_file() else None
    if status is None or status.st_nlink > 1:
        return 0
    return max(status.st_size, _BLOCK_BYTES * status.st_blocks)
