"""qpa train: from a planned run to a frozen adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.documents import FrozenAdapter
    from qpa.passes.freeze_adapter import FreezeAdapter
    from qpa.passes.measure_circuit import MeasureCircuit
    from qpa.passes.train_generator import TrainGenerator
    from qpa.store.run_directory import RunDirectory

EXAMPLES = """
[bold]Examples[/bold]

qpa train runs/bard --data shakespeare.txt

qpa train runs/maths --data train.jsonl --eval-data test.jsonl --epochs 3 --batch-size 4 --grad-accum 4

qpa train runs/bard --data shakespeare.txt --resume   (with the other options of the interrupted run)
"""


def makers() -> Makers:
    """Return the passes whose options `qpa train` takes."""
    from qpa.passes.freeze_adapter import FreezeAdapter
    from qpa.passes.measure_circuit import MeasureCircuit
    from qpa.passes.train_generator import TrainGenerator

    return {"step": TrainGenerator, "measure": MeasureCircuit, "freeze": FreezeAdapter}


def train(
    run: Annotated[Path, typer.Argument(help="Run directory made by qpa plan.")],
    step: TrainGenerator,
    measure: MeasureCircuit,
    freeze: FreezeAdapter,
    seed: Annotated[
        int | None,
        typer.Option(help="Draws the data order and dropout.", show_default="the plan's seed"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train a run again that is already trained.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train the generator through the base model's loss, then freeze the adapter it generates."""
    from qpa.documents import FrozenAdapter, LogicalCircuit, NativeCircuit
    from qpa.passes import training_pipeline
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    with directory.locked(), progress_bar() as progress, _naming_resume(directory):
        documents = directory.read_through(NativeCircuit if directory.has(NativeCircuit) else LogicalCircuit)
        if not (step.resume or force):
            _check_untrained(directory)
        used_seed = documents[0].provenance.seed if seed is None else seed
        context = PassContext(used_seed, directory.files, documents, progress)
        context = training_pipeline(step, measure, freeze).run(documents[-1], context, directory.write)
    _report(run, context.document(FrozenAdapter), as_json=json_)


@contextmanager
def _naming_resume(run: RunDirectory) -> Iterator[None]:
    """Say of a full disk that a training with checkpoints can be resumed."""
    from qpa.errors import DiskFullError
    from qpa.store.run_directory import CHECKPOINTS, list_checkpoints

    try:
        yield
    except DiskFullError as error:
        if not list_checkpoints(run.path / CHECKPOINTS):
            raise
        raise error.advising("free some space and run the same command with --resume") from error


def _check_untrained(run: RunDirectory) -> None:
    from qpa.documents import TrainedGenerator
    from qpa.errors import DirectoryError
    from qpa.store.run_directory import CHECKPOINTS, list_checkpoints

    checkpoints = list_checkpoints(run.path / CHECKPOINTS)
    expected = "a run that is not trained yet"
    advice = "pass --resume or --force" if checkpoints else "pass --force"
    if run.has(TrainedGenerator):
        raise DirectoryError(str(run.path), expected, "a trained one", advice)
    if checkpoints:
        raise DirectoryError(str(run.path), expected, "checkpoints of an interrupted training", advice)


def _report(run: Path, frozen: FrozenAdapter, *, as_json: bool) -> None:
    from qpa.exporters.registry import formats_for
    from qpa.report.facts import account_json, account_rows, result_json, result_rows

    if as_json:
        print_json(
            {"run": str(run), "account": account_json(frozen.account), "result": result_json(frozen.result)}
        )
        return
    print_table(f"{run}: trained and frozen", result_rows(frozen.result) + account_rows(frozen.account))
    if frozen.result.eval_loss >= frozen.result.base_loss:
        print_line(
            "the adapter is no better than the base model: train again with a lower --lr and --angle-lr"
        )
    plainest = formats_for(frozen.method)[0]
    print_line(f"wrote {run}; next: qpa export {run} --format {plainest} --out <directory>")


COMMAND = Command(train, EXAMPLES, makers)
