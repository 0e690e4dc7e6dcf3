"""One generator that contexts program, against other ways to spend the same numbers on several tasks.

    python -m benchmarks.fast_weights --model <stories260K> --tasks bard=<input.txt> wiki=<valid.txt> \\
        maths=<train.jsonl> --unseen tasks=<seed_tasks.jsonl> --out fast_weights.jsonl

What the literature claims: a small classical network that programs the angles of a circuit ("fast weights")
learns time series and simple control tasks as well as, or better than, quantum recurrent networks, without
backpropagation through time (S. Y.-C. Chen, arXiv 2402.17760); and one network that makes adapters for many
tasks from embeddings of these is as good as adapters of their own, with fewer numbers (HyperFormer, Mahabadi
et al., arXiv 2106.04489). Neither makes adapters with circuits.

Every method trains the generator `state` for the same number of steps in all, on the same rows in the same
turns, and within the same total of trained numbers, of which it takes the nearest size:

    programmed        one circuit with a sign, whose angles a network programs from a trained vector a task
    prompt            the same, from what the base model makes of a few training rows of each task
    apart             a circuit for each task, each of 1/n of the numbers, with directions of its own gradient
    apart-common      the same with the directions that all tasks share, as in the other methods
    shared            one circuit for all tasks, without contexts
    log-linear        the network programs the control log-linear instead of a circuit
    log-linear-shared the control log-linear for all tasks, without contexts

An unseen text is scored with every adapter that a method has; the one of "prompt" for that text is programmed
by a few rows of it, of which none is scored and on which nothing was trained. A cell is one method, size,
rate and seed; cells that are in OUT are not run again, and several processes may write to one OUT. The table
takes the rate whose mean validation loss is lowest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qpa.bench.generated import calibrate_on, with_seed
from qpa.bench.report import markdown_table
from qpa.bench.setting import Setting
from qpa.bench.task import Task, load_task
from qpa.bench.trial import batches, learning_rate_scale, losses
from qpa.documents import WeightLayout
from qpa.errors import DivergedError
from qpa.generators.fast_weights import contexts_of
from qpa.generators.generator import GENERATORS, layout_of, make_generator
from qpa.generators.layout_options import LayoutOptions
from qpa.seeds import split_seed
from qpa.training.calibration import choose_rows
from qpa.training.contexts import context_of_rows, set_contexts
from qpa.training.evaluation import causal_loss
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator
from qpa.training.plain_step import take_step

MAX_LAYERS = 64
Line = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to spend trained numbers on several tasks.

    Args:    features: of the generator.
             context: the kind of contexts; None for none.
             is_apart: whether each task has a generator of its own.
             has_own_directions: whether their directions are those of the task's own gradient.
             rates: of the scale; that of angles, or of a control's numbers, is twice as high.
    """

    features: str = "signed"
    context: str | None = None
    is_apart: bool = False
    has_own_directions: bool = False
    rates: tuple[float, ...] = (0.015, 0.05, 0.15)


WAYS = {
    "programmed": Way(context="task"),
    "prompt": Way(context="prompt"),
    "apart": Way(is_apart=True, has_own_directions=True, rates=(0.05, 0.15, 0.45)),
    "apart-common": Way(is_apart=True),
    "shared": Way(),
    "log-linear": Way("log-linear", context="task", rates=(0.005, 0.015, 0.05)),
    "log-linear-shared": Way("log-linear", rates=(0.0015, 0.005, 0.015)),
}


class Cell(NamedTuple):
    """One run."""

    method: str
    budget: int
    rate: float
    seed: int


class Family:
    """The adapters of one run, one for each task, and what trains them."""

    def __init__(self, way: Way, tasks: dict[str, Task], cell: Cell, options: argparse.Namespace) -> None:
        self.tasks, self.names = tasks, tuple(tasks)
        base = tasks[self.names[0]].base
        spec = with_seed(base.inspect(None), cell.seed)
        plan = LayoutOptions(generator="state", features=way.features)
        if way.context is not None:
            size = options.context_size
            plan = replace(plan, contexts=self.names, context_kind=way.context, context_size=size)
        n_made = len(tasks) if way.is_apart else 1
        self.layout = _nearest(plan, spec, cell.budget / n_made)
        lr, self.adapters = cell.rate, []
        for index in range(n_made):
            generator = make_generator(self.layout, cell.seed)
            angle_lr = lr * GENERATORS["state"].angle_ratio
            made = attach_generator(base.load(), spec, generator, lr=lr, angle_lr=angle_lr)
            if way.context == "prompt":
                rows = [_as_rows(task.base.train_rows) for task in tasks.values()]
                set_contexts(made.model, contexts_of(generator), rows, self.layout.seed)
            chosen = [self.names[index]] if way.has_own_directions else self.names
            pool = torch.cat([tasks[name].base.train_rows for name in chosen])
            rows_of_batches = choose_rows(len(pool), options.batch_size, split_seed(cell.seed, "calibration"))
            calibrate_on(base, made, spec, [pool[numbers] for numbers in rows_of_batches])
            self.adapters.append(made)

    @property
    def n_trained(self) -> int:
        """Return how many numbers are trained in all."""
        return len(self.adapters) * self.layout.account.n_generator

    def adapter_of(self, index: int) -> GeneratedAdapter:
        """Return the adapter of a task, set to it."""
        made = self.adapters[index % len(self.adapters)]
        if self.layout.features.contexts is not None:
            made.optimizer.use_context(index)
        return made

    def train(self, cell: Cell, options: argparse.Namespace) -> None:
        """Take all steps, of the tasks in turn; all methods see the same rows.

        Raises:  DivergedError: a loss or gradient is not finite.
        """
        rows = [
            batches(task.base.train_rows, options.batch_size, options.steps, cell.seed)
            for task in self.tasks.values()
        ]
        for step in range(options.steps):
            index = step % len(rows)
            made, ids = self.adapter_of(index), next(rows[index])
            for group in made.optimizer.param_groups:
                group["lr"] = cell.rate * learning_rate_scale(step, options.steps)
            take_step(made.optimizer, causal_loss(made.model, ids, ids, bf16=False))


def _as_rows(rows: torch.Tensor) -> list[dict[str, Any]]:
    return [{"input_ids": row} for row in rows.tolist()]


def _nearest(plan: LayoutOptions, spec: Any, budget: float) -> WeightLayout:
    """Return the layout whose trained numbers are nearest to a budget."""
    sizes = (
        [replace(plan, layers=n) for n in range(1, MAX_LAYERS + 1)]
        if plan.features == "signed"
        else [replace(plan, control_size=n) for n in range(1, 1 + round(budget))]
    )
    first, *_, last = (
        layout_of(size, spec, spec.provenance).account.n_generator for size in (sizes[0], sizes[-1])
    )
    step = (last - first) / max(1, len(sizes) - 1)
    index = round((budget - first) / step) if step else 0
    return layout_of(sizes[min(max(index, 0), len(sizes) - 1)], spec, spec.provenance)


def run_cell(
    cell: Cell, tasks: dict[str, Task], unseen: dict[str, Task], options: argparse.Namespace
) -> Line:
    """Train once, and score every task and unseen text."""
    torch.manual_seed(cell.seed)
    family = Family(WAYS[cell.method], tasks, cell, options)
    line = {**cell._asdict(), "steps": options.steps, "context_size": options.context_size}
    line |= {"tasks": list(tasks), "n_trained": family.n_trained}
    first = family.adapters[0]
    with first.model.disable_adapter():
        line["base"] = {name: losses(task, first.model)[1] for name, task in (tasks | unseen).items()}
    try:
        family.train(cell, options)
    except DivergedError:
        return line | {"validation": None}
    scored = {
        name: losses(task, family.adapter_of(index).model) for index, (name, task) in enumerate(tasks.items())
    }
    line["validation"] = {name: found[0] for name, found in scored.items()}
    line["test"] = {name: found[1] for name, found in scored.items()}
    line["unseen"] = {name: _of_unseen(family, text) for name, text in unseen.items()}
    return line


def _of_unseen(family: Family, text: Task) -> dict[str, float | None]:
    """Return the loss of an unseen text with each adapter, and with one that its own rows program."""
    own = family.names if len(family.adapters) > 1 or family.layout.features.contexts else ("all",)
    found = {name: losses(text, family.adapter_of(index).model)[1] for index, name in enumerate(own)}
    contexts = family.layout.features.contexts
    if contexts is not None and contexts.kind == "prompt":
        (made,) = family.adapters
        rows = [row["input_ids"] for row in _as_rows(text.base.train_rows)]
        with made.model.disable_adapter():
            vectors = contexts_of(made.generator)
            vector = context_of_rows(made.model, rows, vectors, family.layout.seed)
        made.optimizer.use_context(vector)
        found["itself"] = losses(text, made.model)[1]
    return found


# The table


def tables(lines: Sequence[Line]) -> str:
    """Return the test losses of tasks and of unseen texts, means over seeds at each method's best rate."""
    cells: dict[tuple[str, int], dict[float, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["validation"] is not None:
            cells[line["method"], line["budget"]][line["rate"]].append(line)
    names, unseen = lines[0]["tasks"], list(lines[0]["base"])[len(lines[0]["tasks"]) :]
    rows: list[tuple[str, ...]] = [
        (
            "method",
            "budget",
            "numbers",
            "rate",
            "seeds",
            *names,
            "mean",
            *(f"unseen {name}" for name in unseen),
        )
    ]
    base = lines[0]["base"]
    mean = statistics.mean(base[name] for name in names)
    rows.append(
        (
            "base model",
            *[""] * 4,
            *(f"{base[n]:.3f}" for n in names),
            f"{mean:.3f}",
            *(f"{base[n]:.3f}" for n in unseen),
        )
    )
    for (method, budget), by_rate in sorted(
        cells.items(), key=lambda item: (item[0][1], list(WAYS).index(item[0][0]))
    ):
        rate, best = min(by_rate.items(), key=lambda item: _validation(item[1]))
        rows.append(
            (
                *(method, str(budget), f"{best[0]['n_trained']:,}", f"{rate:g}", str(len(best))),
                *(_spread([line["test"][name] for line in best]) for name in names),
                _spread([statistics.mean(line["test"].values()) for line in best]),
                *(_unseen_words([line["unseen"][name] for line in best]) for name in unseen),
            )
        )
    return markdown_table(rows)


def _validation(lines: Sequence[Line]) -> float:
    return float(statistics.mean(statistics.mean(line["validation"].values()) for line in lines))


def _spread(values: Sequence[float]) -> str:
    """Return the mean, and half the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" ±{half:.3f}" if len(values) > 1 else "")


def _unseen_words(found: Sequence[dict[str, float]]) -> str:
    return ", ".join(f"{name} {statistics.mean(one[name] for one in found):.3f}" for name in found[0])


# The command


def _named(texts: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield names and files of text; of a jsonl file all strings of a row are a text."""
    for text in texts:
        name, _, file = text.partition("=")
        path = Path(file)
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            texts_of_rows = ["\n".join(one for one in row.values() if isinstance(one, str)) for row in rows]
            path = folder / f"{name}.txt"
            path.write_text("\n\n".join(texts_of_rows))
        yield name, path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description="Contexts that program one generator, and their controls.")
    parser.add_argument("--model", required=True, help="Directory of a causal language model.")
    parser.add_argument("--tasks", nargs="+", required=True, help="NAME=FILE, texts or jsonl, two or more.")
    parser.add_argument("--unseen", nargs="*", default=[], help="NAME=FILE, of texts to score alone.")
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[130, 260, 520], help="Trained numbers.")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="Of the scale, in place of each method's three."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--context-size", type=int, default=2, help="Numbers of a context.")
    parser.add_argument("--steps", type=int, default=150, help="Of all tasks together.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--test-share", type=float, default=0.25, help="Share of the test texts.")
    parser.add_argument("--out", type=Path, required=True, help="File of results, to which lines are added.")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> str:
    """Run the cells that are missing, and return the table of all."""
    torch.set_num_threads(1)
    out: Path = options.out
    done: list[Line] = [json.loads(text) for text in out.read_text().splitlines()] if out.is_file() else []
    known = {Cell(*(line[name] for name in Cell._fields)) for line in done}
    with tempfile.TemporaryDirectory() as folder:
        tasks, unseen = (
            {name: load_task(_setting(options, path)) for name, path in _named(texts, Path(folder))}
            for texts in (options.tasks, options.unseen)
        )
        for cell in (one for one in _cells(options) if one not in known):
            done.append(run_cell(cell, tasks, unseen, options))
            with out.open("a") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
    return tables(done)


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    for method, budget, seed in itertools.product(options.methods, options.budgets, options.seeds):
        for rate in options.rates or WAYS[method].rates:
            yield Cell(method, budget, rate, seed)


def _setting(options: argparse.Namespace, data: Path) -> Setting:
    return Setting(
        model=options.model,
        data=data,
        max_steps=options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        test_share=options.test_share,
        device="cpu",
    )


if __name__ == "__main__":
    print(run(parse()))
