"""The commands of the pages, run in this process on less, in a directory that has what the pages name."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest import mock

from qpa.cli.main import main
from tests.tiny_models import tiny_gpt2, tiny_llama

MODELS: dict[str, Callable[[Path], Path]] = {"models/stories260K": tiny_llama, "models/gpt2": tiny_gpt2}
SMALLER = {
    "basis": ("--batches", "1", "--max-length", "32", "--batch-size", "2"),
    "train": ("--max-steps", "2", "--max-length", "32", "--batch-size", "2"),
    "freeze": ("--shots", "256"),
    "explain": ("--rows", "2", "--permutations", "1"),
    "run": ("--set", "train.max_steps=2", "--set", "train.max_length=32", "--set", "train.batch_size=2"),
    "demo.build_model": ("--steps", "3"),
    "noise": ("--shots", "64,256", "--targets", "none", "--seeds", "1"),
}
"""What is put behind a command's own options; of an option that is given twice the last one counts."""
KEPT = frozenset({"--batch-size"})
"""Options whose value on the page counts."""

BEFORE = (
    "plan --model models/stories260K --rank 4 --circuits 1 --out runs/bard",
    "train runs/bard --data shakespeare.txt",
    "export runs/bard --out adapters/bard",
)
"""The commands whose results the pages take for granted, unless they make them themselves."""


N_COLUMNS = 100
"""The width of the terminal that the pages show."""


def furnish(place: Path, text: Path) -> None:
    """Put what the pages name into a place: tiny models, a text, a trained run and its export."""
    for name, make in MODELS.items():
        (place / name).parent.mkdir(exist_ok=True)
        make(place / name)
    shutil.copy(text, place / "shakespeare.txt")
    with chdir(place):
        for line in BEFORE:
            assert run_command(["qpa", *line.split()]) == 0, line


def is_run(words: list[str]) -> bool:
    """Return whether a command is one of qpa, or of the demonstration, which are run here."""
    return words[0] == "qpa" or (words[:2] == ["python", "-m"] and words[2].startswith("demo."))


def run_command(words: list[str], *, in_full: bool = False) -> int:
    """Run a command, and write what it prints into the file behind a ">" where there is one.

    Args:    in_full: run it as it stands, and not on less.
    Returns: its exit code.
    """
    words, _, file = " ".join(map(shlex.quote, words)).partition(" '>' ")
    command = shlex.split(words) if in_full else smaller(shlex.split(words))
    run = run_qpa if command[0] == "qpa" else run_module
    if not file:
        return run(command)
    with Path(shlex.split(file)[0]).open("w") as stream, redirect_stdout(stream):
        return run(command)


def run_qpa(words: list[str]) -> int:
    """Run a command of qpa in this process; return its exit code."""
    return exit_code_of(main, words)


def run_module(words: list[str]) -> int:
    """Run a module of the repository, `python -m ..`, in this process; return its exit code."""
    return exit_code_of(import_module(words[2]).main, words[2:])


def exit_code_of(program: Callable[[], object], words: list[str]) -> int:
    """Return with which code a program ends that is called by these words."""
    with mock.patch.object(sys, "argv", words):
        try:
            program()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def smaller(words: list[str]) -> list[str]:
    """Return a command that takes less time; an option of the page that is in `KEPT` stays."""
    name = words[1] if words[0] == "qpa" else words[2]
    more = SMALLER.get(name, ())
    if name == "freeze" and "--source" not in words:
        more = ()  # the training's source, which is exact
    if name == "train" and "--source" in words:
        more = (*more, "--shots", "256")
    pairs = zip(more[::2], more[1::2], strict=True)
    return [*words, *(word for pair in pairs if pair[0] not in KEPT.intersection(words) for word in pair)]
