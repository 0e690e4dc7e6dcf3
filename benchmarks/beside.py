"""One command of qpa in two checkouts, in turns: is the newer one slower?

Measured: CPU and wall time of `python -m qpa.cli ...` in a process of its own, which imports qpa from the one
checkout or the other; who goes first alternates, and one run of each warms the disk cache. A ratio is the
median of the rounds' ratios, with its quartiles. `{out}` in the command stands for a new directory.

    python -m benchmarks.beside ../before . -- plan --model ./models/stories260K --out {out}/run
    python -m benchmarks.beside ../before . --setup "plan --model ./models/stories260K --out {out}/run" -- \\
        train {out}/run --data text.txt --max-steps 200
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.paired import markdown, spread, spread_of_ratios


class Times(NamedTuple):
    """What one process took, in seconds."""

    cpu_s: float
    wall_s: float


def main() -> None:
    """Run the command in turns and print both times and their ratio."""
    parser = argparse.ArgumentParser(description="Time a command of qpa in two checkouts, in turns.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--setup", default="", help="A command that is run first, and not timed.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    checkouts = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    rounds: dict[str, list[Times]] = {name: [] for name in checkouts}
    for index in range(-1, arguments.rounds):
        for name in sorted(checkouts, reverse=index % 2 == 0):
            times = run(checkouts[name], shlex.split(arguments.setup), arguments.command)
            if index >= 0:
                rounds[name].append(times)
    print(markdown(("", "CPU, s", "wall, s"), _rows(rounds)))


def run(checkout: Path, setup: list[str], command: list[str]) -> Times:
    """Run a command of a checkout in a new directory; return what it took without its setup.

    Raises:  CalledProcessError: one of the commands fails.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        words = [[word.replace("{out}", out) for word in line] for line in (setup, command) if line]
        for line in words[:-1]:
            subprocess.run(
                [sys.executable, "-m", "qpa.cli", *line], check=True, capture_output=True, env=environment
            )
        cpu_s, wall_s = _children_s(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "qpa.cli", *words[-1]], check=True, capture_output=True, env=environment
        )
        return Times(_children_s() - cpu_s, time.perf_counter() - wall_s)


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _rows(rounds: dict[str, list[Times]]) -> list[tuple[str, ...]]:
    columns = {name: list(zip(*times, strict=True)) for name, times in rounds.items()}
    rows = [(name, *(spread(values).text() for values in columns[name])) for name in columns]
    pairs = zip(columns["after"], columns["before"], strict=True)
    return [*rows, ("after / before", *(spread_of_ratios(new, old).text() for new, old in pairs))]


if __name__ == "__main__":
    main()
