"""The function by which long work reports how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """A function that is called with what is being done, how many units are done, and how many there are.

    A training tells facts besides, as numbers by name: "loss" in nats per token, and "tokens" so far.
    """

    def __call__(
        self, description: str, n_done: int, n_total: int, facts: Mapping[str, float] = {}, /
    ) -> None:
        """Report progress."""
        ...


def silent(description: str, n_done: int, n_total: int, facts: Mapping[str, float] = {}, /) -> None:
    """Report progress to nobody."""
