"""Progress as people see it: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from qpa.cli.progress import LINE_EVERY_S, N_REPORTS, Meter, bar_of_progress, lines_of_progress


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(clock: Clock, seconds: float, n: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield steps of a training, one every so many seconds, each of 1,000 tokens, with a loss that falls."""
    for step in range(1, n + 1):
        clock.time_s += seconds
        yield step, {"loss": 5 - step / 1000, "tokens": 1000.0 * step}


def test_a_log_gets_a_line_now_and_then(clock: Clock) -> None:
    lines: list[str] = []
    report = lines_of_progress(clock, lines.append)
    report("loading the data", 0, 1)
    for step, facts in steps(clock, 2, 40):
        report("training", step, 1000, facts)
    assert lines == [
        "training 15/1,000, loss 4.985, 500 tokens/s, 0:32:50 left",
        "training 30/1,000, loss 4.970, 500 tokens/s, 0:32:20 left",
    ]


def test_short_work_says_nothing_and_long_work_without_facts_says_when_it_ends(clock: Clock) -> None:
    lines: list[str] = []
    report = lines_of_progress(clock, lines.append)
    for row in range(4):
        report("evaluating", row, 4)
        clock.time_s += LINE_EVERY_S / 5
    assert lines == []
    clock.time_s += LINE_EVERY_S
    report("measuring", 0, 8)
    clock.time_s += LINE_EVERY_S
    report("measuring", 2, 8)
    clock.time_s += LINE_EVERY_S
    report("measuring", 8, 8)
    assert lines == ["measuring 0/8", "measuring 2/8, 0:01:30 left", "measuring 8/8"]


def test_rates_are_those_of_the_last_steps_and_not_of_a_training_before(clock: Clock) -> None:
    meter = Meter(clock)
    meter.update(500, {"tokens": 1e6})  # a checkpoint's
    for step, facts in steps(clock, 100, 10):
        meter.update(500 + step, {"tokens": 1e6 + facts["tokens"]})
    assert meter.words(600) == "10 tokens/s, 2:30:00 left"
    for step, facts in steps(clock, 1, N_REPORTS):
        meter.update(510 + step, {"tokens": 1e6 + 10000 + facts["tokens"]})
    assert meter.words(600) == "1,000 tokens/s, 0:00:40 left"


def test_a_bar_shows_the_same_words(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(TextColumn("{task.description}: {task.fields[words]}"), console=console) as bar:
        report = bar_of_progress(clock, bar)
        report("loading", 1, 1)
        for step, facts in steps(clock, 2, 3):
            report("training", step, 10, facts)
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("loading", 1, 1),
            ("training", 3, 10),
        ]
        assert bar.tasks[1].fields["words"] == "loss 4.997, 500 tokens/s, 0:00:14 left"
