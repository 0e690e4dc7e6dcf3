"""metrics.jsonl: a line for every tenth step, and one for each evaluation.

Every line is an object with "step", the number of optimizer steps done.

1. An evaluation, before the first step and after the last: the objective's scores, of "sft" eval_loss in nats
   per token and eval_perplexity. The first line also tells what each step costs on the circuits' source:
   step_circuits that are run, step_executions, every shot counted, and step_jobs in which they travel.
2. A line of training. Its step alone gives grad_norm, learning_rate, angle_learning_rate, epoch and, where
   TRL counts them, num_tokens, the tokens trained on since the first step. All other numbers are means over
   the steps since the line before: loss, in nats per token, and what else the trainer reports, such as TRL's
   entropy and mean_token_accuracy.

No line holds a time or a duration, so nothing may differ between a training and one that was killed, however
often, and resumed on the same machine: both files are the same, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpa.store.atomic_files import write_file
from qpa.store.disk_space import room_for

LOG_STEPS = 10
_OF_THE_STEP = frozenset({"step", "epoch", "grad_norm", "learning_rate", "angle_learning_rate", "num_tokens"})


class TrainingLog:
    """Append metrics to a jsonl file.

    Args:    path: the file.
             resumed_step: the step of the checkpoint that training goes on from; later lines are dropped,
             and so is that step's evaluation, for they will be written again. None starts an empty log.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        self.path = path
        kept = (
            []
            if resumed_step is None
            else [line for line in read_log(path) if _is_before(line, resumed_step)]
        )
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line: the step and its metrics.

        Raises:  DiskFullError: there is no room for it.
        """
        line = json.dumps({"step": step, **metrics}) + "\n"
        with room_for(self.path, len(line)), self.path.open("a") as stream:
            stream.write(line)


def line_of_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the line for consecutive steps: the mean of each number, or its last value, as said above.

    Args:    steps: what the trainer reports of each step.
    """
    return {
        name: last if name in _OF_THE_STEP else sum(step[name] for step in steps) / len(steps)
        for name, last in steps[-1].items()
    }


def _is_before(line: dict[str, int], step: int) -> bool:
    return line["step"] < step or (line["step"] == step and "eval_loss" not in line)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without those that a kill cut short; [] where there is none."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8-sig").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a line cut short by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
