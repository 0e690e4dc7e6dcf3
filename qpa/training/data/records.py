"""A record: what one row of a file says, and where it stands, so that every error can name the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qpa.errors import DataError


class Origin(NamedTuple):
    """Where a record stands: its file, and the line, entry or row in it, from 1 on."""

    place: str
    unit: str
    number: int

    def __str__(self) -> str:
        """Return the place as errors name it, such as "rows.jsonl, line 3"."""
        return f"{self.place}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of one row.

    Args:    content: values of JSON by the names of the columns.
             origin: the row's place.
    """

    content: Mapping[str, Any]
    origin: Origin


def check_characters(origin: Origin, name: str, value: Any) -> None:
    """Refuse what JSON can say and UTF-8 cannot: an escape such as \\ud83d without its other half.

    Args:    name: of the column.
             value: of JSON; all strings in it are checked.
    Raises:  DataError: there is half of a surrogate pair.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_characters(origin, name, key)
            check_characters(origin, name, item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_characters(origin, name, item)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f'half of a surrogate pair in "{name}" (\\u{ord(value[error.start]):04x})'
            raise DataError(
                str(origin), "whole characters", found, "remove it, or complete the pair"
            ) from error


def names_in(content: Mapping[str, Any]) -> str:
    """Return the names of the columns as errors say what was found."""
    if not content:
        return "an empty object"
    names = sorted(content)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return "keys " + ", ".join(f'"{name}"' for name in names[:6]) + more
