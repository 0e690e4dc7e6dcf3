"""Rows of a table."""

from __future__ import annotations

Rows = list[tuple[str, ...]]


def number(value: int) -> str:
    """Write an integer with thousands separators."""
    return f"{value:,}"
