"""qpa transpile: the circuit of a run for another device, before training or after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table

if TYPE_CHECKING:
    from qpa.passes.transpile_circuit import TranspileCircuit

EXAMPLES = """
[bold]Examples[/bold]

qpa transpile runs/bard --device-target fake_torino

qpa transpile runs/bard --device-target generic:27 --json
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
    json_: JsonOption = False,
) -> None:
    """Transpile the circuit of a run to a device, once more; what was trained stays as it is."""
    from qpa.documents import LogicalCircuit
    from qpa.passes import transpilation_pipeline
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.report.facts import transpiled_json, transpiled_rows
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    with directory.locked():
        documents = directory.read_through(LogicalCircuit)
        used_seed = documents[0].provenance.seed if seed is None else seed
        context = PassContext(used_seed, directory.files, documents)
        context = transpilation_pipeline(step).run(None, context, directory.write)
    if json_:
        print_json({"run": str(run), "circuit": transpiled_json(context.documents)})
        return
    print_table(f"{run}: transpiled", transpiled_rows(context.documents))
    print_line(f"wrote {run}")


COMMAND = Command(transpile, EXAMPLES, makers)
