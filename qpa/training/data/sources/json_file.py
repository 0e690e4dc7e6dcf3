"""Records of a JSON file: one object a line, or, in a .json file, also one array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpa.errors import DataError
from qpa.training.data.records import Origin, Record
from qpa.training.data.sources.text_file import read_text


def read_json(path: Path) -> Iterator[Record]:
    """Yield the objects of a file; blank lines are left out.

    Raises:  DataError: the file is not a text, is broken, or has something else than objects.
    """
    text = read_text(path)
    is_array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    for origin, content in _entries(path, text) if is_array else _lines(path, text):
        if not isinstance(content, dict):
            raise DataError(str(origin), "an object", type(content).__name__)
        yield Record(content, origin)


def _lines(path: Path, text: str) -> Iterator[tuple[Origin, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            origin = Origin(str(path), "line", number)
            yield origin, _parse(str(origin), "an object", line)


def _entries(path: Path, text: str) -> Iterator[tuple[Origin, Any]]:
    entries = _parse(str(path), "a JSON array of objects", text)
    for number, entry in enumerate(entries, start=1):
        yield Origin(str(path), "entry", number), entry


def _parse(subject: str, expected: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(subject, expected, f"broken JSON ({error})") from error
