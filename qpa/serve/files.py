"""Small files that somebody else may have written, read whole."""

from __future__ import annotations

from pathlib import Path

from qpa.errors import DocumentError


def read_whole(path: Path, max_bytes: int, advice: str = "") -> bytes:
    """Return the bytes of a file.

    Args:    max_bytes: the most that is read, so that a hostile file does not fill the memory.
             advice: what to do where it is missing.
    Raises:  DocumentError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise DocumentError(str(path), "a file that can be read", found, advice) from error
    if len(content) > max_bytes:
        raise DocumentError(str(path), f"at most {max_bytes:,} bytes", "more")
    return content
