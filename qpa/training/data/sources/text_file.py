"""Read a text file whole: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

from qpa.errors import DataError


def read_text(path: Path) -> str:
    """Return the text of a file, with its line ends as they are and without a byte order mark.

    Raises:  DataError: the file is missing, empty, binary or not UTF-8.
    """
    if not path.is_file():
        raise DataError(str(path), "a data file", "a directory" if path.is_dir() else "no such file")
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(str(path), "UTF-8 text", "UTF-16 text", "convert it to UTF-8")
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(str(path), "text", "an empty file")
    if b"\0" in raw:
        raise DataError(str(path), "text", f"binary data (byte 0 at offset {raw.index(0)})")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise DataError(str(path), "UTF-8 text", found, "convert it to UTF-8") from error
