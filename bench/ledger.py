"""The bench's results.jsonl: one line for each run, which is appended and synced, and never made twice.

Kinds of line:
1. "budget": a budget that was asked for. "unmet": one for which a method has no size, with the nearest size.
2. "base": the base model's losses.
3. "run": one trial, with everything that determines it.
A last line without a line feed was cut off by a kill: it is dropped, and its run is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpa.errors import DataError, DirectoryError
from qpa.store.atomic_files import locked_directory
from qpa.store.disk_space import room_for

FILE_NAME = "results.jsonl"
Line = dict[str, Any]
_WORDS_OF_TODAY = {'"label": "heads ': '"label": "circuits ', '["heads", ': '["circuits", '}
"""What is replaced in lines from when circuits were called heads, so that their runs are found again."""
_KEY = ("kind", "method", "label", "knobs", "rate", "seed", "budget")


def key_of(line: Line) -> str:
    """Return what makes two lines of one book the same run."""
    return json.dumps([line.get(name) for name in _KEY])


@dataclass
class Book:
    """The lines of one results.jsonl.

    Args:    path: of the file.
             facts: the setting all its lines share.
             lines: what is there, oldest first.
    """

    path: Path
    facts: dict[str, object]
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_key = {key_of(line): line for line in self.lines}

    @classmethod
    @contextmanager
    def opened(cls, directory: Path, facts: dict[str, object]) -> Iterator[Book]:
        """Yield the book of a directory, held for this process; a torn last line is cut off.

        Raises:  DirectoryError: another process holds it, or it was made in another setting.
                 DataError: a line in it is broken.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        with locked_directory(directory, "results that no command uses", "those of another qpa bench"):
            if path.exists():
                _cut_torn_line(path)
            lines = read_lines(path) if path.exists() else []
            for line in lines:
                _check_setting(path, line["setting"], facts)
            yield cls(path, facts, lines)

    def find(self, line: Line) -> Line | None:
        """Return the line of the same run, or None."""
        return self._by_key.get(key_of(line))

    def write(self, line: Line) -> None:
        """Append a line and sync it; a run that is there already is not written again.

        Raises:  DiskFullError: there is no room for it.
        """
        whole = {**line, "setting": self.facts}
        if self.find(whole) == whole:
            return
        text = json.dumps(whole) + "\n"
        with room_for(self.path, len(text)), self.path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self.lines.append(whole)
        self._by_key[key_of(whole)] = whole


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a results.jsonl, without a torn last one.

    Raises:  DataError: the file is missing, or a line is broken.
    """
    if not path.is_file():
        raise DataError(str(path), "results of qpa bench", "no such file", "run qpa bench without `report`")
    whole, _, _ = path.read_text(encoding="utf-8-sig").rpartition("\n")
    for old, new in _WORDS_OF_TODAY.items():
        whole = whole.replace(old, new)
    return [_parse(path, number, line) for number, line in enumerate(whole.split("\n"), 1) if line]


def _parse(path: Path, number: int, text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not (isinstance(line, dict) and "kind" in line and "setting" in line):
        raise DataError(f"{path}, line {number}", "a result of qpa bench", "something else")
    return line


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    n_whole = content.rfind(b"\n") + 1
    if n_whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(n_whole)


def _check_setting(path: Path, found: Any, facts: dict[str, object]) -> None:
    for name, value in facts.items():
        other = found.get(name) if isinstance(found, dict) else None
        if other != value:
            raise DirectoryError(
                str(path),
                f"results with {name} {_short(value)}",
                f"{name} {_short(other)}",
                "pass another `out`, or the options of these results",
            )


def _short(value: object) -> str:
    return str(value)[:60]
