"""Budgets of trained parameters, and which size of a method serves one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qpa.bench.method import Configuration
from qpa.errors import OptionError
from qpa.generators.size_search import parse_budget

MAX_SIZE_RATIO = 1.35


class Budget(NamedTuple):
    """A number of trained parameters, and how the user wrote it."""

    text: str
    n_trained: int


def parse_budgets(texts: Sequence[str], n_reference: int) -> tuple[Budget, ...]:
    """Read budgets such as "25%" of LoRA r=4, or "1850" parameters.

    Args:    n_reference: trained parameters of LoRA r=4.
    Raises:  OptionError: one is no positive number.
    """
    if not texts:
        raise OptionError("budgets", "at least one, such as 25% or 1850", "none")
    return tuple(
        Budget(text, round(parse_budget("budgets", text, n_reference))) for text in dict.fromkeys(texts)
    )


def size_ratio(n_trained: int, budget: int) -> float:
    """Return by which factor a size misses a budget; 1 is exact."""
    return math.exp(abs(math.log(max(1, n_trained) / budget)))


def choose(configurations: Iterable[Configuration], budget: int) -> Configuration | None:
    """Return the configuration nearest to a budget in log(parameters), or None if there are none."""
    usable = [configuration for configuration in configurations if configuration.n_trained > 0]
    return min(usable, key=lambda c: size_ratio(c.n_trained, budget), default=None)
