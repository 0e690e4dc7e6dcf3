"""Where a bench makes its runs: what --workers says, and a local Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest

from qpa.bench.ledger import Book
from qpa.bench.methods import find_methods
from qpa.bench.schedule import Grid, plan_cells, run_one
from qpa.bench.setting import Setting
from qpa.bench.sizes import Budget
from qpa.bench.task import load_task
from qpa.bench.workers import HERE, Workers, open_workers, parse_workers
from qpa.errors import OptionError
from qpa.termination import Terminated
from tests.test_bench_grid import runs


@pytest.mark.parametrize(
    ("text", "workers"),
    [
        ("1", HERE),
        ("4", Workers(4)),
        ("ray", Workers(ray="")),
        ("ray:auto", Workers(ray="auto")),
        ("ray:ray://head:10001", Workers(ray="ray://head:10001")),
    ],
)
def test_workers_are_a_number_or_a_cluster(text: str, workers: Workers) -> None:
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["0", "-1", "", "2.5", "rays", "Ray", "dask"])
def test_other_workers_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="workers: expected a number of processes, ray or ray:ADDRESS"):
        parse_workers(text)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(OptionError, match="install qpa with its extra ray"),
        open_workers(Workers(ray=""), "cpu"),
    ):
        pass


def die_once(marker: Path) -> str:
    """Kill this worker the first time."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "made again"


def test_a_killed_process_is_reported(tmp_path: Path) -> None:
    with open_workers(Workers(2), "cpu") as (executor, n_at_once):
        assert n_at_once == 2
        with pytest.raises(BrokenExecutor):
            executor.submit(die_once, tmp_path / "marker").result()


def test_whoever_ends_a_bench_does_not_wait_for_its_runs() -> None:
    with pytest.raises(Terminated), open_workers(Workers(2), "cpu") as (executor, _):
        executor.submit(time.sleep, 1000)
        raise Terminated
    assert not multiprocessing.active_children()


ORPHANS = """
import os, signal, sys, time
from qpa.bench.workers import Workers, open_workers
if __name__ == "__main__":
    with open_workers(Workers(2), "cpu") as (executor, _):
        print(executor.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    # This returns once the last process that may write to the pipe is gone.
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip().isdecimal()


def run_after_a_kill(setting: Setting, trial: Any) -> Any:
    """Make a run, but kill the worker of the very first."""
    die_once(setting.data.with_name("killed"))
    return run_one(setting, trial)


@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_results_of_one_process_and_makes_a_killed_run_again(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    data = tmp_path / "text.txt"
    data.write_bytes(text_file.read_bytes())
    task = load_task(Setting(str(llama), data, max_steps=2, batch_size=2, max_length=32))
    found = []
    for workers in (HERE, Workers(ray="")):
        if workers != HERE:
            monkeypatch.setattr("qpa.bench.schedule.run_one", run_after_a_kill)
        with Book.opened(tmp_path / str(workers.ray), task.facts) as book:
            cells, _ = plan_cells(task.base, find_methods(["unilora"]), [Budget("50", 50)])
            assert Grid(task, cells, book, n_seeds=1, workers=workers, say=lambda line: None).run() == 0
        found.append({run["rate"]: run["test"] for run in runs(tmp_path / str(workers.ray))})
    assert (tmp_path / "killed").exists()
    assert found[0] == found[1]
    assert len(found[0]) == 3
