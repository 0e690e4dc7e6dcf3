"""Rows of a table."""

from __future__ import annotations

Rows = list[tuple[str, ...]]


def number(value: int) -> str:
    """Write an integer with thousands separators."""
    return f"{value:,}"


def several(n: int, word: str) -> str:
    """Write how many there are of something whose plural ends with s."""
    return f"{number(n)} {word}{'' if n == 1 else 's'}"
