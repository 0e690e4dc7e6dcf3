"""Time contenders side by side: in one process, in turns, so that noise of the machine meets all of them.

In every round each contender gets one slice, of as many calls as fill `SLICE_S`; who goes first rotates.
A ratio is the median of the rounds' ratios, with its quartiles, not a ratio of medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SLICE_S = 0.02


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    def text(self, digits: int = 3) -> str:
        """Write "median (low .. high)" with a number of significant digits."""
        low, median, high = (f"{value:#.{digits}g}".rstrip(".") for value in self)
        return f"{median} ({low} .. {high})"


def spread(values: Sequence[float]) -> Spread:
    """Return the median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def spread_of_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the rounds' ratios."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]], *, n_rounds: int, budget_s: float = math.inf
) -> dict[str, list[float]]:
    """Return seconds per call, one value a round, for every contender.

    Args:    contenders: called without arguments; each is called twice before the first round.
             budget_s: no round beyond the third starts once this much time is spent.
    """
    n_calls = {name: _calls_per_slice(call) for name, call in contenders.items()}
    order = list(contenders)
    durations_s: dict[str, list[float]] = {name: [] for name in contenders}
    started_s = time.perf_counter()
    for index in range(n_rounds):
        if index >= 3 and time.perf_counter() - started_s > budget_s:
            break
        for name in order:
            durations_s[name].append(_time_slice(contenders[name], n_calls[name]))
        order.append(order.pop(0))
    return durations_s


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _calls_per_slice(call: Callable[[], object]) -> int:
    call()
    return max(1, round(SLICE_S / max(1e-6, _time_slice(call, 1))))


def _time_slice(call: Callable[[], object], n_calls: int) -> float:
    started_s = time.perf_counter()
    for _ in range(n_calls):
        call()
    return (time.perf_counter() - started_s) / n_calls
