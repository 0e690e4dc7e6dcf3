"""The function by which long work reports how far it has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""A function that is called with what is being done, how many units are done, and how many there are."""


def silent(description: str, n_done: int, n_total: int) -> None:
    """Report progress to nobody."""
