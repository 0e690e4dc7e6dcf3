"""From a setting and an extent to a directory of results: everything `qpa bench` does but draw the report."""

from __future__ import annotations

import math
import time
from pathlib import Path

from qpa.bench.ledger import Book
from qpa.bench.methods import ABLATION, find_methods
from qpa.bench.schedule import Grid, plan_cells, record_plan
from qpa.bench.setting import Extent, Setting
from qpa.bench.sizes import parse_budgets
from qpa.bench.task import load_task
from qpa.bench.workers import parse_workers
from qpa.pipeline.options import check_options


def compare(setting: Setting, extent: Extent, out: Path) -> tuple[int, bool]:
    """Make the runs that are missing in a directory of results, as far as time allows.

    Returns: how many runs are left, and whether there is one to report.
    Raises:  OptionError: an option is out of range, or the results there are of another setting.
             ModelError, DataError: the setting cannot be run.
    """
    started_s = time.monotonic()
    check_options(extent)
    workers = parse_workers(extent.workers)
    methods = find_methods(ABLATION if extent.ablate else extent.methods)
    task = load_task(setting)
    budgets = parse_budgets(extent.budgets, task.n_reference)
    with Book.opened(out, task.facts) as book:
        cells, unmet = plan_cells(task.base, methods, budgets)
        record_plan(book, budgets, unmet)
        deadline_s = math.inf if extent.minutes is None else started_s + 60 * extent.minutes
        n_left = Grid(task, cells, book, extent.seeds, workers, deadline_s).run()
    return n_left, any(line["kind"] == "run" for line in book.lines)
