"""Records of a CSV file: a first line with the names of the columns, and a record in each row after it.

Columns are separated by commas, by tabs in a .tsv file, or by semicolons where the first line has those and
no comma. Quoted values may hold separators, quotes (doubled) and line ends.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qpa.errors import DataError
from qpa.training.data.records import Origin, Record
from qpa.training.data.sources.text_file import read_text

_LARGEST_VALUE = 2**31 - 1
"""Characters in a value; Python's own limit is made for tables, not for texts."""


def read_csv(path: Path) -> Iterator[Record]:
    """Yield the rows of a file, whose values are all strings; blank lines are left out.

    Raises:  DataError: the file is no text, a quote is never closed, or a row has not one value a column.
    """
    rows = _rows(path, read_text(path))
    origin, names = next(rows)
    twice = [name for name, n_times in Counter(names).items() if n_times > 1]
    if twice or not all(names):
        found = f'"{twice[0]}" twice' if twice else "a column without a name"
        raise DataError(str(origin), "a different name for each column", found)
    for origin, values in rows:
        if len(values) != len(names):
            raise DataError(str(origin), f"{len(names)} values, as in the first line", str(len(values)))
        yield Record(dict(zip(names, values, strict=True)), origin)


def _rows(path: Path, text: str) -> Iterator[tuple[Origin, list[str]]]:
    """Yield rows with the line on which each begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(path, text), strict=True)
    line = 1
    limit = csv.field_size_limit(_LARGEST_VALUE)
    try:
        for values in reader:
            if len(values) > 1 or any(value.strip() for value in values):
                yield Origin(str(path), "line", line), values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}", "a row of a CSV file", str(error)) from error
    finally:
        csv.field_size_limit(limit)


def _separator(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = text.lstrip().split("\n", 1)[0]
    return ";" if ";" in first and "," not in first else ","
