"""Which runs a bench is made of, and how they are scheduled.

Rules:
1. A method serves a budget with its configuration nearest in log(parameters); if that is off by more than a
   factor of 1.35, it cannot meet the budget. A configuration that serves two budgets is run once.
2. A cell is a method and a configuration: a search of its rates, mostly three, with seed 0, then the other
   seeds with the rate of the lowest validation loss. The test loss chooses nothing.
3. Cells are finished in order, budget by budget, so that an interrupted bench compares whole budgets.
4. Only the parent process writes results.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from qpa.bench.ledger import Book, Line, key_of
from qpa.bench.method import BenchBase, Configuration, Method
from qpa.bench.methods import METHODS
from qpa.bench.setting import Setting
from qpa.bench.sizes import MAX_SIZE_RATIO, Budget, choose, size_ratio
from qpa.bench.task import Task, load_task
from qpa.bench.trial import Measured, losses, run_trial
from qpa.bench.workers import HERE, Workers, open_workers
from qpa.errors import OptionError, one_sentence

SEARCH_SEED = 0


class Cell(NamedTuple):
    """A method at one size."""

    method: Method
    configuration: Configuration


class Trial(NamedTuple):
    """One run of a cell."""

    cell: Cell
    rate: float
    seed: int

    @property
    def line(self) -> Line:
        """Return what identifies the run in the book."""
        label, knobs, _ = self.cell.configuration
        return {
            "kind": "run",
            "method": self.cell.method.name,
            "label": label,
            "knobs": [list(knob) for knob in knobs],
            "rate": self.rate,
            "seed": self.seed,
        }


def plan_cells(
    base: BenchBase, methods: Sequence[Method], budgets: Sequence[Budget]
) -> tuple[list[Cell], list[Line]]:
    """Return the cells in the order to run them, and a line for each budget a method cannot meet."""
    sizes = {m.name: m.sizes(base, [budget.n_trained for budget in budgets]) for m in methods}
    cells: dict[tuple[str, Configuration], Cell] = {}
    unmet: list[Line] = []
    for budget in budgets:
        for method in methods:
            nearest = choose(sizes[method.name], budget.n_trained)
            if nearest is not None and size_ratio(nearest.n_trained, budget.n_trained) <= MAX_SIZE_RATIO:
                cells.setdefault((method.name, nearest), Cell(method, nearest))
                continue
            label, n_trained = (nearest.label, nearest.n_trained) if nearest else ("none", 0)
            unmet.append(
                {
                    "kind": "unmet",
                    "method": method.name,
                    "budget": budget.text,
                    "label": label,
                    "n_trained": n_trained,
                }
            )
    return list(cells.values()), unmet


def record_plan(book: Book, budgets: Sequence[Budget], unmet: Sequence[Line]) -> None:
    """Write down what was asked for, so that a report needs nothing but the book."""
    for budget in budgets:
        book.write({"kind": "budget", "budget": budget.text, "n_trained": budget.n_trained})
    for line in unmet:
        book.write(line)


def best_rate(cell: Cell, book: Book) -> float | None:
    """Return the rate of the lowest validation loss.

    Returns: None while the search runs, or if every rate diverged.
    """
    found = [(rate, book.find(Trial(cell, rate, SEARCH_SEED).line)) for rate in cell.method.rates]
    if any(line is None for _, line in found):
        return None
    scored = [(line["validation"], rate) for rate, line in found if line and line["validation"] is not None]
    return min(scored)[1] if scored else None


def missing_trials(cell: Cell, book: Book, n_seeds: int) -> list[Trial]:
    """Return the runs that a cell needs now: those of its search, or, after that, of its other seeds."""
    search = [Trial(cell, rate, SEARCH_SEED) for rate in cell.method.rates]
    missing = [trial for trial in search if book.find(trial.line) is None]
    rate = best_rate(cell, book)
    if missing or rate is None:
        return missing
    others = [Trial(cell, rate, seed) for seed in range(n_seeds) if seed != SEARCH_SEED]
    return [trial for trial in others if book.find(trial.line) is None]


def n_runs_left(cells: Sequence[Cell], book: Book, n_seeds: int) -> int:
    """Return how many runs are still to be made."""
    return sum(_n_left(cell, book, n_seeds) for cell in cells)


def _n_left(cell: Cell, book: Book, n_seeds: int) -> int:
    missing = missing_trials(cell, book, n_seeds)
    searching = any(trial.seed == SEARCH_SEED for trial in missing)
    return len(missing) + (n_seeds - 1 if searching else 0)


@dataclass
class Grid:
    """A bench at work.

    Args:    n_seeds: runs that each cell's mean is over.
             workers: where the runs are made.
             deadline_s: no run starts after this reading of `time.monotonic`.
             say: is called with each line of progress.
    """

    task: Task
    cells: Sequence[Cell]
    book: Book
    n_seeds: int
    workers: Workers = HERE
    deadline_s: float = math.inf
    say: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr, flush=True))

    def __post_init__(self) -> None:
        self._failed: set[Cell] = set()

    def run(self) -> int:
        """Make every run that is missing, as far as time allows.

        Returns: how many runs are left.
        """
        self._record_base()
        pending: dict[Future[Measured], tuple[Trial, float]] = {}
        with open_workers(self.workers, self.task.setting.device) as (executor, n_at_once):
            while True:
                self._submit(executor, n_at_once, pending)
                if not pending:
                    return n_runs_left(self.cells, self.book, self.n_seeds)
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    self._record(future, *pending.pop(future))

    def _submit(
        self, executor: Executor, n_at_once: int, pending: dict[Future[Measured], tuple[Trial, float]]
    ) -> None:
        """Fill the workers with the first runs that are ready."""
        under_way = {key_of(trial.line) for trial, _ in pending.values()}
        for trial in self._ready():
            if len(pending) >= n_at_once or time.monotonic() >= self.deadline_s:
                return
            if key_of(trial.line) not in under_way:
                started_s = time.monotonic()
                future = executor.submit(run_one, self.task.setting, self._portable(trial))
                pending[future] = (trial, started_s)

    def _ready(self) -> Iterator[Trial]:
        for cell in self.cells:
            if cell not in self._failed:
                yield from missing_trials(cell, self.book, self.n_seeds)

    def _portable(self, trial: Trial) -> Trial | PortableTrial:
        if self.workers == HERE:
            return trial
        (method, configuration), rate, seed = trial
        return PortableTrial(method.name, configuration, rate, seed)

    def _record_base(self) -> None:
        line: Line = {"kind": "base"}
        if self.book.find(line) is None:
            validation, test = losses(self.task, self.task.base.load())
            self.book.write({**line, "validation": validation, "test": test})

    def _record(self, future: Future[Measured], trial: Trial, started_s: float) -> None:
        error = future.exception()
        if isinstance(error, BrokenExecutor):
            raise OptionError(
                "workers",
                "worker processes that finish their runs",
                "a worker that the system ended",
                "pass fewer",
            ) from error
        if error is not None:
            self._skip(trial.cell, error)
            return
        measured = future.result()
        self.book.write({**trial.line, **measured.as_json()})
        n_done = self._n_done()
        n_total = n_done + n_runs_left(self.cells, self.book, self.n_seeds)
        loss = "diverged" if measured.test is None else f"{measured.test:.4f}"
        self.say(
            f"[{n_done}/{n_total}] {trial.cell.method.name} {trial.cell.configuration.label} "
            f"{measured.n_trained:,} seed {trial.seed} lr {trial.rate:g}: {loss} "
            f"({time.monotonic() - started_s:.0f} s)"
        )

    def _skip(self, cell: Cell, error: BaseException) -> None:
        """Leave a cell whose run broke; a second start of the bench tries it again."""
        self._failed.add(cell)
        reason = one_sentence(error, limit=200)
        self.say(
            f"error: {cell.method.name} {cell.configuration.label}: {reason}; its other runs are skipped"
        )

    def _n_done(self) -> int:
        names = {(cell.method.name, cell.configuration.label) for cell in self.cells}
        return sum(
            (line.get("method"), line.get("label")) in names
            for line in self.book.lines
            if line["kind"] == "run"
        )


class PortableTrial(NamedTuple):
    """A run as it is sent to another process, with its method's name in place of the method."""

    method: str
    configuration: Configuration
    rate: float
    seed: int


def run_one(setting: Setting, trial: Trial | PortableTrial) -> Measured:
    """Make one run, here or in a worker."""
    task = load_task(setting)
    if isinstance(trial, PortableTrial):
        return run_trial(task, METHODS[trial.method], trial.configuration, trial.rate, trial.seed)
    return run_trial(task, trial.cell.method, trial.cell.configuration, trial.rate, trial.seed)
