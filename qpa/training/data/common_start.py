"""How far two sequences agree from their start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def n_common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the number of items, or characters, that two sequences have in common at their start."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(index for index in range(shorter) if left[index] != right[index])
