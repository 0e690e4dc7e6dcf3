"""metrics.jsonl: a line for every tenth step, or as many as are asked for, and one for each evaluation.

Every line is an object with "step", the number of optimizer steps done.

1. An evaluation, before the first step, after the last, and where it is asked for in between: the objective's
   scores, of "sft" eval_loss in nats per token and eval_perplexity. The first line also tells what each step
   costs on the circuits' source: step_circuits that are run, step_executions, every shot counted, and
   step_jobs in which they travel; and start_loss, where training starts from another adapter. The last line
   is about what is frozen: frozen_step says after which step that was, where the best is kept.
2. A line of training. Its step alone gives grad_norm, the norm of the adapter's gradient,
   generator_grad_norm, where the generator's gradient is clipped, learning_rate, angle_learning_rate, epoch
   and, where TRL counts them, num_tokens, the tokens trained on since the first step; in float16 also
   loss_scale. All other numbers are means over the steps since the line before: loss, in nats per token, and
   what else the trainer reports, such as TRL's entropy and mean_token_accuracy.

No line holds a time or a duration, so nothing may differ between a training and one that was killed, however
often, and resumed on the same machine: both files are the same, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpa.store.atomic_files import write_file
from qpa.store.disk_space import room_for

_OF_THE_STEP = frozenset(
    {
        *("step", "epoch", "num_tokens", "loss_scale"),
        *("grad_norm", "generator_grad_norm", "learning_rate", "angle_learning_rate"),
    }
)


class TrainingLog:
    """Append metrics to a jsonl file.

    Args:    path: the file.
             resumed_step: the step of the checkpoint that training goes on from; later lines are dropped, for
             they will be written again. None starts an empty log.
             is_over: whether no step is left after that one; its evaluation will be written again too.
             listen: called with every line that is written, as `write` is.
    """

    def __init__(
        self,
        path: Path,
        resumed_step: int | None = None,
        *,
        is_over: bool = False,
        listen: Callable[[int, Mapping[str, object]], None] = lambda step, metrics: None,
    ) -> None:
        self.path = path
        self.listen = listen
        kept = [] if resumed_step is None else list(_lines_before(path, resumed_step, is_over=is_over))
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line: the step and its metrics.

        Raises:  DiskFullError: there is no room for it.
        """
        line = json.dumps({"step": step, **metrics}) + "\n"
        with room_for(self.path, len(line)), self.path.open("a") as stream:
            stream.write(line)
        self.listen(step, metrics)


def line_of_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the line for consecutive steps: the mean of each number, or its last value, as said above.

    Args:    steps: what the trainer reports of each step.
    """
    return {
        name: last if name in _OF_THE_STEP else sum(step[name] for step in steps) / len(steps)
        for name, last in steps[-1].items()
    }


def _lines_before(path: Path, step: int, *, is_over: bool) -> Iterator[dict[str, int]]:
    for line in read_log(path):
        if line["step"] < step or (line["step"] == step and not (is_over and "eval_loss" in line)):
            yield line


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
