"""metrics.jsonl: one line a logged step, and one for each evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qpa.atomic_files import write_file


class TrainingLog:
    """Append metrics to a jsonl file.

    Args:    path: the file.
             first_step: lines of this step and later are dropped when the log is opened, because a
             resumed training writes them again; 0 starts an empty log.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line["step"] < first_step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line: the step and its metrics."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")


def _lines(path: Path) -> list[dict[str, int]]:
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a line cut short by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
