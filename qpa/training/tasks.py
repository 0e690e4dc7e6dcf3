"""The tasks of a training whose generator has contexts: a source of the data for each, in their order.

Rules:
1. The rows of a task are those that a training on its source alone would have, held-out ones included. So
   sources of several shapes, such as texts and messages, go together.
2. All tasks are scored, each with the adapter of its own context. The loss is that of all their tokens, and
   "loss_NAME" that of the task NAME.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from qpa.circuits.sources.source import SOURCES
from qpa.documents import Contexts, DataSummary, SplitSummary
from qpa.documents.trained_generator import perplexity
from qpa.errors import OptionError
from qpa.progress import Progress
from qpa.training.data.data_options import names_of
from qpa.training.data.splits import Splits
from qpa.training.evaluation import count_row_tokens, digest_of_rows
from qpa.training.objectives.objective import LOSS, OBJECTIVES, PERPLEXITY, Objective
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.training_options import TrainingOptions


class Task(NamedTuple):
    """A context and its rows."""

    name: str
    splits: Splits


def read_tasks(
    options: TrainingOptions, tokenizer: Any, contexts: Contexts | None, seed: int
) -> tuple[Task, ...]:
    """Read the source of every context, as a training on it alone would; () where there are no contexts.

    Args:    seed: draws the rows that are held out.
    Raises:  OptionError: there are not as many sources as contexts, or the training is one that knows none.
             DataError: see `Objective.rows`.
    """
    if contexts is None:
        return ()
    _check(options)
    data = _one_each("data", names_of(options.data), contexts.names)
    evaluation: Sequence[str | None] = [None] * len(data)
    if options.eval_data:
        evaluation = _one_each("eval_data", names_of(options.eval_data), contexts.names)
    kind, tasks = OBJECTIVES[options.objective], []
    for name, source, held_out in zip(contexts.names, data, evaluation, strict=True):
        own = replace(options, data=(source,), eval_data=None if held_out is None else (held_out,))
        tasks.append(Task(name, kind(own, tokenizer).rows(seed)))
    return tuple(tasks)


def together(tasks: Sequence[Task]) -> Splits:
    """Return the rows of all tasks, one task's after the other's."""
    return Splits(
        [row for task in tasks for row in task.splits.training],
        [row for task in tasks for row in task.splits.evaluation],
        _summary([task.splits.summary for task in tasks if task.splits.summary]),
    )


def digest_of(splits: Splits, tasks: Sequence[Task]) -> str:
    """Return a digest of all rows, which tells one task's from another's."""
    parts = [task.splits for task in tasks] or [splits]
    return digest_of_rows(*(rows for part in parts for rows in (part.training, part.evaluation)))


def score_tasks(
    objective: Objective,
    model: Any,
    tasks: Sequence[Task],
    optimizer: GeneratedAdapterOptimizer,
    progress: Progress,
    description: str,
) -> dict[str, float]:
    """Return the scores of a model on the evaluation splits of all tasks; see rule 2."""
    total, n_tokens, found = 0.0, 0, {}
    for index, task in enumerate(tasks):
        optimizer.use_context(index)
        rows = task.splits.evaluation
        loss = objective.scores(model, rows, progress, f"{description} on {task.name}")[LOSS]
        n = count_row_tokens(rows)
        total, n_tokens = total + n * loss, n_tokens + n
        found[score_name(task.name)] = loss
    optimizer.leave_context()
    loss = total / n_tokens
    return {LOSS: loss, PERPLEXITY: perplexity(loss), **found}


def score_name(task: str) -> str:
    """Return under which name the loss of a task is among the scores."""
    return f"{LOSS}_{task}"


def _check(options: TrainingOptions) -> None:
    """Refuse a training whose steps have no contexts."""
    if options.objective != "sft":
        raise OptionError("objective", "sft with `contexts`", options.objective)
    if options.fp16:
        raise OptionError("fp16", "no steps that are left out, with `contexts`", "fp16", "use `bf16`")
    if SOURCES[options.source].needs_backend:
        expected = "one that is simulated, with `contexts`, since every evaluation runs all of them"
        raise OptionError("source", expected, options.source, "freeze the contexts on the device")


def _one_each(option: str, names: Sequence[str], contexts: Sequence[str]) -> Sequence[str]:
    if len(names) != len(contexts):
        expected = f"{len(contexts)} sources, one for each of {', '.join(contexts)}"
        raise OptionError(option, expected, f"{len(names)}: {', '.join(names)}")
    return names


def _summary(parts: Sequence[DataSummary]) -> DataSummary | None:
    if not parts:
        return None
    templates = [part.chat_template for part in parts if part.chat_template]
    return DataSummary(
        shape="+".join(dict.fromkeys(part.shape for part in parts)),
        hub=tuple(dict.fromkeys(one for part in parts for one in part.hub)),
        chat_template=templates[0] if templates else None,
        training=_sum([part.training for part in parts]),
        evaluation=_sum([part.evaluation for part in parts]),
    )


def _sum(parts: Sequence[SplitSummary]) -> SplitSummary:
    counts = [part.model_dump() for part in parts]
    return SplitSummary(**{name: sum(one[name] for one in counts) for name in SplitSummary.model_fields})
