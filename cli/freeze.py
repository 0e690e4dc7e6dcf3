"""qpa freeze: from a trained run to another frozen adapter, of circuits that are measured once more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, progress_bar
from qpa.cli.train import report_frozen, transpile_first

if TYPE_CHECKING:
    from qpa.passes.freeze_adapter import FreezeAdapter
    from qpa.passes.measure_circuit import MeasureCircuit

EXAMPLES = """
[bold]Examples[/bold]

qpa freeze runs/bard --source exact

qpa freeze runs/bard --source noisy --device-target fake_torino --shots 65536 --mitigation
depolarizing --data shakespeare.txt
"""


def makers() -> Makers:
    """Return the passes whose options `qpa freeze` takes."""
    from qpa.passes.freeze_adapter import FreezeAdapter
    from qpa.passes.measure_circuit import MeasureCircuit
    from qpa.passes.transpile_circuit import TranspileCircuit

    return {"measure": MeasureCircuit, "freeze_": FreezeAdapter, "transpile": (TranspileCircuit,)}


def freeze(
    run: Annotated[Path, typer.Argument(help="Run directory that qpa train has trained.")],
    measure: MeasureCircuit,
    freeze_: FreezeAdapter,
    transpile: dict[str, Any],
    seed: Annotated[int | None, typer.Option(help="Draws the shots.", show_default="the plan's seed")] = None,
    json_: JsonOption = False,
) -> None:
    """Measure the trained circuits once more, and freeze the adapter that the counts give.

    With options of qpa transpile, such as --device-target, the circuit is transpiled first. With --data,
    which is that of the training, the adapter is scored on the same evaluation split.
    """
    from qpa.documents import TrainedGenerator, WeightLayout
    from qpa.passes import freezing_pipeline
    from qpa.pipeline.pass_protocol import PassContext, newest
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    with directory.locked(), progress_bar() as progress:
        documents = directory.read_through(TrainedGenerator)
        measure.check(measure.source or newest(documents, TrainedGenerator).source)
        measure.check_plan(newest(documents, WeightLayout))
        transpile_first(directory, transpile)
        documents = directory.read_through(TrainedGenerator)
        used_seed = documents[0].provenance.seed if seed is None else seed
        context = PassContext(used_seed, directory.files, documents, progress)
        context = freezing_pipeline(measure, freeze_).run(documents[-1], context, directory.write)
    report_frozen(run, context.documents, "frozen", as_json=json_)


COMMAND = Command(freeze, EXAMPLES, makers)
