"""metrics.jsonl: one line a logged step, and one for each evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qpa.store.atomic_files import write_file
from qpa.store.disk_space import room_for


class TrainingLog:
    """Append metrics to a jsonl file.

    Args:    path: the file.
             resumed_step: the step of the checkpoint that training goes on from; later lines are dropped,
             and so is that step's evaluation, for they will be written again. None starts an empty log.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        self.path = path
        kept = (
            [] if resumed_step is None else [line for line in _lines(path) if _is_before(line, resumed_step)]
        )
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line: the step and its metrics.

        Raises:  DiskFullError: there is no room for it.
        """
        line = json.dumps({"step": step, **metrics}) + "\n"
        with room_for(self.path, len(line)), self.path.open("a") as stream:
            stream.write(line)


def _is_before(line: dict[str, int], step: int) -> bool:
    return line["step"] < step or (line["step"] == step and "eval_loss" not in line)


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
