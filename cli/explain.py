"""qpa explain: what each part of a trained run contributes to its loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.passes.explain_generator import ExplainGenerator
    from qpa.progress import Progress

EXAMPLES = """
[bold]Examples[/bold]

qpa explain runs/bard --data shakespeare.txt

qpa explain runs/bard --data shakespeare.txt --rows 64 --permutations 10 --json
"""


def makers() -> Makers:
    """Return the pass whose options `qpa explain` takes."""
    from qpa.passes.explain_generator import ExplainGenerator

    return {"step": ExplainGenerator}


def explain(
    run: Annotated[Path, typer.Argument(help="Run directory that qpa train has trained.")],
    step: ExplainGenerator,
    json_: JsonOption = False,
) -> None:
    """Say what circuits, decoders, directions, qubits, layers and module types contribute to the loss.

    Each is left out, and put in another order, and the evaluation split of --data, which is that of the
    training, is scored again. The result stays in the run, and qpa report shows it.
    """
    from qpa.documents import Explanation, FrozenAdapter
    from qpa.passes import explaining_pipeline
    from qpa.pipeline.pass_protocol import PassContext, newest
    from qpa.report.explanation import (
        cost_line,
        explanation_json,
        explanation_tables,
        what_is_left_out,
    )
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    with directory.locked(), progress_bar() as progress:
        documents = directory.read_through(FrozenAdapter)
        costs = partial(cost_line, step.rows, documents)
        told = _telling_costs(progress, lambda n_total: print(costs(n_total), file=sys.stderr))
        context = PassContext(documents[0].provenance.seed, directory.files, documents, told)
        documents = explaining_pipeline(step).run(documents[-1], context, directory.write).documents
    if json_:
        print_json({"run": str(run), **explanation_json(newest(documents, Explanation))})
        return
    for table in explanation_tables(documents):
        print_table(table.title, table.rows, table.header)
    for words in what_is_left_out(documents):
        print_line(words)
    print_line(f"wrote {run / Explanation.file_name()}; next: qpa report {run}")


def _telling_costs(progress: Progress, tell: Callable[[int], None]) -> Progress:
    """Return a progress function that first tells how often the evaluation split will be scored."""
    from qpa.passes.explain_generator import SCORING

    def show(description: str, n_done: int, n_total: int, facts: Mapping[str, float] = {}, /) -> None:
        if (description, n_done) == (SCORING, 0):
            tell(n_total)
        progress(description, n_done, n_total, facts)

    return show


COMMAND = Command(explain, EXAMPLES, makers)
