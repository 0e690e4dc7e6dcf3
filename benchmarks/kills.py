"""Kill trainings and benches at random moments, go on, and compare the bits with those of one that was not.

Five cases: a training; one with packing; one that evaluates, keeps the best and accumulates in bfloat16;
one of two processes, of which one is killed; a bench, of which a worker is killed, or the parent. The
command is started again and again, and killed by SIGKILL at a random moment after its first sign of work,
until it has been killed as often as asked for; then it is left to finish. What it gives must be the same,
byte for byte: for a training the adapter and metrics.jsonl, for a bench its losses. The table also says how
many steps a kill lost at most. Linux.

    python -m benchmarks.kills --model <directory> --data <text> [--kills 4]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from benchmarks.paired import markdown

SAVE_STEPS = 5
N_STEPS = 60
BEST = ("--eval-steps", "7", "--early-stopping", "8", "--grad-accum", "2", "--bf16")
LONGEST_S = 3.0
"""A kill comes at most this long after the first sign of work."""


class Case(Protocol):
    """A command that is killed and started again.

    Class attributes: `name` stands in the table.
    """

    name: ClassVar[str]

    def start(self, out: Path, *, goes_on: bool) -> list[subprocess.Popen[bytes]]:
        """Start the command, in one process or several."""
        ...

    def file(self, out: Path) -> Path:
        """Return the file whose writing is the first sign of work."""
        ...

    def n_lost(self, out: Path) -> int:
        """Return how many steps or runs a kill has lost, where that is known."""
        ...

    def result(self, out: Path) -> object:
        """Return what must be the same."""
        ...


@dataclass(frozen=True)
class Training:
    """qpa train.

    Args:    more: further options.
             n_processes: how many train together.
    """

    name: str
    model: Path
    data: Path
    more: tuple[str, ...] = ()
    n_processes: int = 1

    def start(self, out: Path, *, goes_on: bool) -> list[subprocess.Popen[bytes]]:
        """See `Case`."""
        run = out / "run"
        if not goes_on:
            _finish([_python(["plan", "--model", str(self.model), "--rank", "4", "--out", str(run)])])
        words = ["train", str(run), "--data", str(self.data), "--max-length", "64", "--batch-size", "4"]
        words += ["--max-steps", str(N_STEPS), "--save-steps", str(SAVE_STEPS), "--log-steps", "1"]
        words += ["--device", "cpu", *self.more]
        words += ["--resume"] if goes_on and _newest(run) else ["--force"]
        return [_python(words, **rank) for rank in _ranks(self.n_processes)]

    def file(self, out: Path) -> Path:
        """See `Case`."""
        return out / "run" / "metrics.jsonl"

    def n_lost(self, out: Path) -> int:
        """See `Case`."""
        return max(0, _steps_logged(out / "run") - _newest(out / "run"))

    def result(self, out: Path) -> object:
        """See `Case`: the digest of the adapter, and the metrics."""
        frozen = json.loads((out / "run" / "frozen-adapter.json").read_text())
        return frozen["arrays"]["sha256"], (out / "run" / "metrics.jsonl").read_bytes()


@dataclass(frozen=True)
class Bench:
    """qpa bench with two worker processes."""

    name: str
    model: Path
    data: Path

    def start(self, out: Path, *, goes_on: bool) -> list[subprocess.Popen[bytes]]:
        """See `Case`."""
        words = ["bench", "--model", str(self.model), "--data", str(self.data), "--out", str(out / "bench")]
        words += ["--methods", "qpa,unilora", "--budgets", "10%", "--seeds", "2", "--max-steps", "20"]
        return [_python([*words, "--max-length", "64", "--device", "cpu", "--workers", "2"])]

    def file(self, out: Path) -> Path:
        """See `Case`."""
        return out / "bench" / "results.jsonl"

    def n_lost(self, out: Path) -> int:
        """See `Case`: at most the runs under way."""
        return 0

    def result(self, out: Path) -> object:
        """See `Case`: what each run is, and its losses, in any order."""
        lines = [json.loads(line) for line in (out / "bench" / "results.jsonl").read_text().splitlines()]
        names = ("method", "label", "rate", "seed", "validation", "test")
        return sorted(json.dumps([line[name] for name in names]) for line in lines if line["kind"] == "run")


def main() -> None:
    """Kill every case as often as asked for, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=4, help="Of each case.")
    parser.add_argument("--seed", type=int, default=0, help="Draws the moments.")
    options = parser.parse_args()
    paths = {"model": options.model.resolve(), "data": options.data.resolve()}
    cases: list[Any] = [
        Training("training", **paths),
        Training("training with packing", **paths, more=("--packing",)),
        Training("training that keeps the best", **paths, more=BEST),
        Training("training of two processes", **paths, n_processes=2),
        Bench("bench with two workers", **paths),
    ]
    chance = random.Random(options.seed)
    rows = [_try(case, options.kills, chance) for case in cases]
    print(markdown(("case", "kills", "lost at most", "same result"), rows))


def _try(case: Case, n_kills: int, chance: random.Random) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        _finish(case.start(Path(whole), goes_on=False))
        n_done, lost, goes_on = 0, 0, False
        while n_done < n_kills:
            before = _written_at(case.file(Path(killed)))
            processes = case.start(Path(killed), goes_on=goes_on)
            goes_on = True
            works = partial(_is_written_since, case.file(Path(killed)), before)
            if _kill(processes, works, chance):
                n_done, lost = n_done + 1, max(lost, case.n_lost(Path(killed)))
                print(f"{case.name}: kill {n_done} of {n_kills}", file=sys.stderr)
        _finish(case.start(Path(killed), goes_on=True))
        same = case.result(Path(whole)) == case.result(Path(killed))
    return (case.name, str(n_done), str(lost), "yes" if same else "NO")


def _written_at(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


def _is_written_since(file: Path, before: int) -> bool:
    return _written_at(file) > before


def _kill(
    processes: Sequence[subprocess.Popen[bytes]], works: Callable[[], bool], chance: random.Random
) -> bool:
    """Kill one of several processes, or a child of one, at a random moment; return whether it was there."""
    while not works():
        if any(process.poll() is not None for process in processes):
            _end(processes)
            return False
        time.sleep(0.01)
    time.sleep(chance.uniform(0, LONGEST_S))
    alive = [process.pid for process in processes if process.poll() is None]
    if not alive:
        return False
    os.kill(chance.choice([one for pid in alive for one in (pid, *_children(pid))]), signal.SIGKILL)
    _end(processes)
    return True


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended by themselves.

    Raises:  TimeoutExpired: one goes on without the one that was killed.
    """
    for process in processes:
        process.wait(timeout=120)


def _finish(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def _python(words: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
    log = subprocess.DEVNULL
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, "-m", "qpa.cli", *words], env=variables, stdout=log, stderr=log)


def _ranks(n: int) -> list[dict[str, str]]:
    """Return the environments that a launcher gives to several processes of one machine."""
    if n == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def _newest(run: Path) -> int:
    found = sorted((run / "checkpoints").glob("step-*"))
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


if __name__ == "__main__":
    main()
