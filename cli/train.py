"""qpa train: from a planned run to a frozen adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.documents import Document
    from qpa.passes.freeze_adapter import FreezeAdapter
    from qpa.passes.measure_circuit import MeasureCircuit
    from qpa.passes.train_generator import TrainGenerator
    from qpa.store.run_directory import RunDirectory

LIKE_THE_DATA = 0.6
"""The slope share from which on a bank is of text like the data; docs/results.md has those of some."""

EXAMPLES = """
[bold]Examples[/bold]

qpa train runs/bard --data shakespeare.txt

qpa train runs/maths --data train.jsonl --eval-data test.jsonl --epochs 3 --batch-size 4 --grad-accum 4

qpa train runs/bard --data shakespeare.txt --source noisy --device-target fake_torino --shots 8192

qpa train runs/bard --data shakespeare.txt --resume   (with the other options of the interrupted run)
"""


def makers() -> Makers:
    """Return the passes whose options `qpa train` takes."""
    from qpa.passes.freeze_adapter import FreezeAdapter
    from qpa.passes.measure_circuit import MeasureCircuit
    from qpa.passes.train_generator import TrainGenerator
    from qpa.passes.transpile_circuit import TranspileCircuit

    return {
        "step": TrainGenerator,
        "measure": MeasureCircuit,
        "freeze": FreezeAdapter,
        "transpile": (TranspileCircuit,),
    }


def train(
    run: Annotated[Path, typer.Argument(help="Run directory made by qpa plan.")],
    step: TrainGenerator,
    measure: MeasureCircuit,
    freeze: FreezeAdapter,
    transpile: dict[str, Any],
    seed: Annotated[
        int | None,
        typer.Option(help="Draws the data order and dropout.", show_default="the plan's seed"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train a run again that is already trained.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train the generator through the base model's loss, then freeze the adapter it generates.

    With options of qpa transpile, such as --device-target, the circuit is transpiled first.
    """
    from qpa.circuits.circuit_options import refuse_without_circuits
    from qpa.documents import LogicalCircuit, NativeCircuit, WeightLayout
    from qpa.passes import training_pipeline
    from qpa.pipeline.options import check_options
    from qpa.pipeline.pass_protocol import PassContext, newest
    from qpa.report.costs import cost_lines
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    made: list[Document] = []

    def keep(document: Document) -> None:
        directory.write(document)
        made.append(document)

    with directory.locked(), progress_bar() as progress, _naming_resume(directory, made):
        layout = newest(directory.read_through(LogicalCircuit), WeightLayout)
        if not (step.resume or force):
            _check_untrained(directory)
        check_options(step)
        refuse_without_circuits(step, layout)
        measure.check(step.source)
        measure.check_plan(layout)
        transpile_first(directory, transpile)
        documents = directory.read_through(NativeCircuit if directory.has(NativeCircuit) else LogicalCircuit)
        used_seed = documents[0].provenance.seed if seed is None else seed
        context = PassContext(used_seed, directory.files, documents, progress)
        for line in cost_lines(step, measure, context):
            print(line, file=sys.stderr)
        context = training_pipeline(step, measure, freeze).run(documents[-1], context, keep)
    report_frozen(run, context.documents, "trained and frozen", as_json=json_)


def transpile_first(run: RunDirectory, options: dict[str, Any]) -> None:
    """Transpile a run's circuit with the given options, where there are any, by default for the same device.

    No selection chose that.
    """
    from qpa.documents import LogicalCircuit, NativeCircuit, Selection
    from qpa.passes import transpilation_pipeline
    from qpa.passes.transpile_circuit import TranspileCircuit
    from qpa.pipeline.pass_protocol import PassContext

    if options:
        planned = run.read_through(LogicalCircuit)
        if run.has(NativeCircuit):
            options = {"target": run.read(NativeCircuit).target, **options}
        context = PassContext(planned[0].provenance.seed, run.files, planned)
        run.files.drop_from(Selection)
        transpilation_pipeline(TranspileCircuit(**options)).run(None, context, run.write)


@contextmanager
def _naming_resume(run: RunDirectory, made: Sequence[Document]) -> Iterator[None]:
    """Say of a full disk, and of a device that fails after the training, how to go on.

    Args:    made: the documents that the command has made so far.
    """
    from qpa.documents import TrainedGenerator
    from qpa.errors import DiskFullError, SourceError
    from qpa.store.run_directory import CHECKPOINTS, list_checkpoints

    try:
        yield
    except SourceError as error:
        if not any(isinstance(document, TrainedGenerator) for document in made):
            raise
        raise error.with_advice(f"the training is done: go on with qpa freeze {run.path}") from error
    except DiskFullError as error:
        if not list_checkpoints(run.path / CHECKPOINTS):
            raise
        raise error.advising("free some space and run the same command with --resume") from error


def _check_untrained(run: RunDirectory) -> None:
    from qpa.documents import FrozenAdapter, TrainedGenerator
    from qpa.errors import DirectoryError
    from qpa.store.run_directory import CHECKPOINTS, list_checkpoints

    checkpoints = list_checkpoints(run.path / CHECKPOINTS)
    expected = "a run that is not trained yet"
    if run.has(TrainedGenerator) and not run.has(FrozenAdapter):
        advice = f"freeze it: qpa freeze {run.path}; or pass --force"
        raise DirectoryError(str(run.path), expected, "a trained one that is not frozen", advice)
    advice = "pass --resume or --force" if checkpoints else "pass --force"
    if run.has(TrainedGenerator):
        raise DirectoryError(str(run.path), expected, "a trained one", advice)
    if checkpoints:
        raise DirectoryError(str(run.path), expected, "checkpoints of an interrupted training", advice)


def report_frozen(run: Path, documents: Sequence[Document], words: str, *, as_json: bool) -> None:
    """Print what a frozen adapter is, and how far it is from the exact one."""
    from qpa.documents import FrozenAdapter, TrainedGenerator
    from qpa.exporters.registry import formats_for
    from qpa.pipeline.pass_protocol import newest
    from qpa.report.facts import frozen_json, frozen_rows

    frozen = newest(documents, FrozenAdapter)
    if as_json:
        print_json({"run": str(run), **frozen_json(documents)})
        return
    print_table(f"{run}: {words}", frozen_rows(documents))
    loss = frozen.result.eval_loss if frozen.frozen_loss is None else frozen.frozen_loss
    if loss >= frozen.result.base_loss:
        print_line(
            "the adapter is no better than the base model: train again with a lower --lr and --angle-lr"
        )
    trained = newest(documents, TrainedGenerator)
    bank = trained.bank
    if bank is not None and bank.slope_share is not None and bank.slope_share < LIKE_THE_DATA:
        print_line(
            "no kind of text in the basis is like the data: make a basis with such text, or plan with "
            "thousands of numbers"
        )
    others = [one.name for one in trained.contexts if one.name != frozen.context]
    if others:
        print_line(f"of its other contexts: qpa freeze {run} --context {' or '.join(others)}")
    plainest = formats_for(frozen.method)[0]
    print_line(f"wrote {run}; next: qpa export {run} --format {plainest} --out <directory>")


COMMAND = Command(train, EXAMPLES, makers)
