"""The commands of the pages, run in this process on less, in a directory that has what the pages name."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from unittest import mock

from qpa.cli.main import main
from tests.tiny_models import tiny_gpt2, tiny_llama

MODELS: dict[str, Callable[[Path], Path]] = {"models/stories260K": tiny_llama, "models/gpt2": tiny_gpt2}
SMALLER = {
    "train": ("--max-steps", "2", "--max-length", "32", "--batch-size", "2"),
    "freeze": ("--shots", "256"),
    "noise": ("--shots", "64,256", "--targets", "none", "--seeds", "1"),
}
"""What is put behind a command's own options; of an option that is given twice the last one counts."""

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
            assert run_qpa(["qpa", *line.split()]) == 0, line


def run_qpa(words: list[str]) -> int:
    """Run a command in this process; return its exit code."""
    with mock.patch.object(sys, "argv", smaller(words)):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def smaller(words: list[str]) -> list[str]:
    """Return a command that takes less time, where it has not its own value of the option."""
    more = SMALLER.get(words[1], ()) if len(words) > 1 else ()
    if words[1:2] == ["train"] and "--source" in words:
        more = (*more, "--shots", "256")
    pairs = zip(more[::2], more[1::2], strict=True)
    own = KEPT.intersection(words)
    return [*words, *(word for pair in pairs if pair[0] not in own for word in pair)]


KEPT = frozenset({"--batch-size"})
"""Options whose value on the page counts."""
