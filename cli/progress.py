"""How far long work has come: a bar where stderr is a terminal, and elsewhere a line now and then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from qpa.progress import Progress

LINE_EVERY_S = 30.0
"""Seconds between lines where there is no terminal."""

N_REPORTS = 50
"""Reports over which a rate is taken: the last ones, since steps may become slower or faster."""


class Meter:
    """What is told of one piece of work besides the units that are done.

    Args:    clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reports: deque[tuple[float, int, float]] = deque(maxlen=N_REPORTS)
        self._facts: Mapping[str, float] = {}

    def update(self, n_done: int, facts: Mapping[str, float]) -> None:
        """Take a report.

        Args:    facts: "loss" in nats per token, and "tokens" trained on so far.
        """
        self._facts = facts
        self._reports.append((self._clock(), n_done, facts.get("tokens", 0.0)))

    def words(self, n_total: int) -> str:
        """Return what is known of loss, rate and time: "loss 3.034, 1,234 tokens/s, 0:02:10 left"."""
        (first_s, first, from_), (last_s, last, to) = self._reports[0], self._reports[-1]
        time_s = last_s - first_s
        parts = [f"loss {self._facts['loss']:.3f}"] if "loss" in self._facts else []
        if to > from_ and time_s > 0:
            parts.append(f"{(to - from_) / time_s:,.0f} tokens/s")
        if last > first and last < n_total:
            left_s = (n_total - last) * time_s / (last - first)
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        return ", ".join(parts)


def bar_of_progress(clock: Callable[[], float], bar: Bar) -> Progress:
    """Return a progress function that draws in a bar, whose column of words has the field "words"."""
    tasks: dict[str, TaskID] = {}
    meters: dict[str, Meter] = {}

    def show(description: str, n_done: int, n_total: int, facts: Mapping[str, float] = {}, /) -> None:
        if description not in tasks:
            tasks[description] = bar.add_task(description, total=n_total, words="")
            meters[description] = Meter(clock)
        meter = meters[description]
        meter.update(n_done, facts)
        bar.update(tasks[description], completed=n_done, total=n_total, words=meter.words(n_total))

    return show


def lines_of_progress(clock: Callable[[], float], say: Callable[[str], None]) -> Progress:
    """Return a progress function that says a line every `LINE_EVERY_S` seconds, the first after as many."""
    meters: dict[str, Meter] = {}
    said_s = clock()

    def show(description: str, n_done: int, n_total: int, facts: Mapping[str, float] = {}, /) -> None:
        nonlocal said_s
        meter = meters.setdefault(description, Meter(clock))
        meter.update(n_done, facts)
        if clock() - said_s < LINE_EVERY_S:
            return
        said_s = clock()
        say(", ".join(filter(None, (f"{description} {n_done:,}/{n_total:,}", meter.words(n_total)))))

    return show
