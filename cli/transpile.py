"""qpa transpile: the circuit of a run for another device, before training or after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.documents import Document
    from qpa.passes.transpile_circuit import TranspileCircuit
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.store.run_directory import RunDirectory

SelectOption = Annotated[
    bool,
    typer.Option(
        "--select",
        help="Try transpiler levels, layouts, mitigations and numbers of shots on the simulated noise of the "
        "device, up to 12 qubits, and transpile as the best of them does, in place of --optimization-level "
        "and --layouts.",
    ),
]

EXAMPLES = """
[bold]Examples[/bold]

qpa transpile runs/bard --device-target fake_torino

qpa transpile runs/bard --device-target generic:27 --json

qpa transpile runs/bard --device-target fake_fez --select
"""


def makers() -> Makers:
    """Return the pass whose options `qpa transpile` takes."""
    from qpa.passes.transpile_circuit import TranspileCircuit

    return {"step": TranspileCircuit}


def transpile(
    run: Annotated[Path, typer.Argument(help="Run directory made by qpa plan.")],
    step: TranspileCircuit,
    seed: Annotated[
        int | None, typer.Option(help="Seeds the transpiler.", show_default="the plan's seed")
    ] = None,
    select: SelectOption = False,
    json_: JsonOption = False,
) -> None:
    """Transpile the circuit of a run to a device, once more; what was trained stays as it is."""
    from qpa.documents import LogicalCircuit
    from qpa.passes import transpilation_pipeline
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.report.circuits import transpiled_json, transpiled_rows
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    with directory.locked(), progress_bar() as progress:
        documents = directory.read_through(LogicalCircuit)
        used_seed = documents[0].provenance.seed if seed is None else seed
        context = PassContext(used_seed, directory.files, documents, progress)
        if select:
            context = select_and_transpile(step, context, directory)
        else:
            context = transpilation_pipeline(step).run(None, context, partial(_write_unselected, directory))
    if json_:
        print_json(
            {
                "run": str(run),
                "circuit": transpiled_json(context.documents),
                **selected_json(context.documents),
            }
        )
        return
    report_selection(context.documents)
    print_table(f"{run}: transpiled", transpiled_rows(context.documents))
    print_line(f"wrote {run}")


def select_and_transpile(step: TranspileCircuit, context: PassContext, run: RunDirectory) -> PassContext:
    """Choose how to run the circuit, keep the selection in the run, and transpile as was chosen.

    Returns: the context with the selection and the native circuit added.
    """
    from qpa.circuits.selection import as_chosen, select_strategy
    from qpa.passes import transpilation_pipeline

    selection = select_strategy(step, context)
    run.write(selection)
    context = replace(context, documents=(*context.documents, selection))
    return transpilation_pipeline(as_chosen(step, selection)).run(None, context, run.write)


def _write_unselected(run: RunDirectory, document: Document) -> None:
    """Write a native circuit that no selection chose, and drop the selection of the one before."""
    from qpa.documents import Selection

    run.files.drop_from(Selection)
    run.write(document)


def report_selection(documents: Sequence[Document]) -> None:
    """Print the candidates of a selection, and which one was chosen, where there is one."""
    from qpa.documents import Selection
    from qpa.report.selection import SELECTION_HEADER, selection_rows, selection_title

    for selection in documents:
        if isinstance(selection, Selection):
            print_table(selection_title(selection), selection_rows(selection), SELECTION_HEADER)
            chosen = selection.chosen_strategy
            flags = f"--mitigation {chosen.mitigation} --shots {chosen.shots}"
            print_line(f"chosen (*): {selection.why}; for qpa train and qpa freeze: {flags}")


def selected_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return a selection by its name; nothing where there is none."""
    from qpa.documents import Selection
    from qpa.report.selection import selection_json

    found = [document for document in documents if isinstance(document, Selection)]
    return {one.kind: selection_json(one) for one in found}


COMMAND = Command(transpile, EXAMPLES, makers)
