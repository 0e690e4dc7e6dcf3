"""qpa train: from a planned run to a frozen adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.store.run_directory import RunDirectory

EXAMPLES = """
[bold]Examples[/bold]

qpa train runs/bard --data shakespeare.txt

qpa train runs/maths --data train.jsonl --eval-data test.jsonl --epochs 3 --batch-size 4 --grad-accum 4

qpa train runs/bard --data shakespeare.txt --resume   (with the other options of the interrupted run)
"""


def train(
    run: Annotated[Path, typer.Argument(help="Run directory made by qpa plan.")],
    data: Annotated[Path, typer.Option(help='Text, or jsonl with "text" or with "prompt" and "completion".')],
    eval_data: Annotated[
        Path | None, typer.Option(help="Evaluation split.  [default: a tenth of --data, held out]")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows per micro-batch.")] = 8,
    grad_accum: Annotated[int, typer.Option(help="Micro-batches per optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens per row.")] = 256,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of the decoder.  "
            "[default: 0.02; ia3, prefix: 0.1; ffa: 0.03; --generator aligned: 0.003; paper: 0.001]"
        ),
    ] = None,
    angle_lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of the circuit's angles.  [default: as --lr]"),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Steps of linear warm-up; below 1, the share of all steps.")
    ] = 0.05,
    seed: Annotated[
        int | None, typer.Option(help="Draws the data order and dropout.  [default: the plan's seed]")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="bfloat16 autocast; the adapter stays float32.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train a run again that is already trained.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train the generator through the base model's loss, then freeze the adapter it generates."""
    from qpa.documents import FrozenAdapter, LogicalCircuit, NativeCircuit
    from qpa.passes import training_pipeline
    from qpa.passes.train_generator import TrainGenerator
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    documents = directory.read_through(NativeCircuit if directory.has(NativeCircuit) else LogicalCircuit)
    if not (resume or force):
        _check_untrained(directory)
    step = TrainGenerator(
        data=str(data),
        eval_data=None if eval_data is None else str(eval_data),
        max_steps=max_steps,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum=grad_accum,
        max_length=max_length,
        lr=lr,
        angle_lr=angle_lr,
        warmup=warmup,
        bf16=bf16,
        device=device,
        save_steps=save_steps,
        resume=resume,
        trust_remote_code=trust_remote_code,
    )
    used_seed = documents[0].provenance.seed if seed is None else seed
    with directory.locked(), progress_bar() as progress:
        context = PassContext(used_seed, directory.files, documents, progress)
        context = training_pipeline(step).run(documents[-1], context, directory.write)
    _report(run, context.document(FrozenAdapter), json_)


def _check_untrained(run: RunDirectory) -> None:
    from qpa.documents import TrainedGenerator
    from qpa.errors import OptionError
    from qpa.store.run_directory import CHECKPOINTS, list_checkpoints

    expected, advice = "a run that is not trained yet", "pass --resume or --force"
    if run.has(TrainedGenerator):
        raise OptionError(str(run.path), expected, "a trained one", advice)
    if list_checkpoints(run.path / CHECKPOINTS):
        raise OptionError(str(run.path), expected, "checkpoints of an interrupted training", advice)


def _report(run: Path, frozen: object, as_json: bool) -> None:
    from qpa.documents import FrozenAdapter
    from qpa.exporters.directory import FORMATS_FOR
    from qpa.report.facts import account_json, account_rows, result_json, result_rows

    assert isinstance(frozen, FrozenAdapter)
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
    plainest = FORMATS_FOR[frozen.method][0]
    print_line(f"wrote {run}; next: qpa export {run} --format {plainest} --out <directory>")
