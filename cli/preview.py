"""qpa preview: rows of the data as the model gets them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table

if TYPE_CHECKING:
    from qpa.documents import BaseModelReference
    from qpa.training.data.preview import DataPreview, PreviewedText
    from qpa.training.training_options import TrainingOptions

EXAMPLES = """
[bold]Examples[/bold]

qpa preview bard.yaml

qpa preview bard.yaml --rows 10 --max-length 512 --packing

qpa preview runs/bard --data chats.jsonl --json
"""


def makers() -> Makers:
    """Return what has the options of the data."""
    from qpa.training.data.data_options import DataOptions

    return {"data": (DataOptions,)}


def preview(
    what: Annotated[Path, typer.Argument(help="Configuration file, or run directory made by qpa plan.")],
    data: dict[str, Any],
    rows: Annotated[int, typer.Option(help="Rows to show.", min=0)] = 3,
    objective: Annotated[
        str | None, typer.Option(help="What is trained for.", show_default="sft, or as configured")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Option of the configuration file to change, such as train.max_length=64."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show rows of the training data as the model gets them, what carries the loss, and what is cut.

    Options that are given count more than those of the configuration file or of an earlier training of the
    run. The model's weights are not loaded.
    """
    from qpa.pipeline.options import check_options
    from qpa.training.data.preview import preview_data

    given = data | ({"objective": objective} if objective else {})
    if what.is_dir():
        options, base, seed = _of_run(what, given)
    else:
        options, base, seed = _of_configuration(what, set_ or [], given)
    check_options(options)
    shown = preview_data(options, base, seed, rows, trust_remote_code=options.trust_remote_code)
    if json_:
        print_json(_json(shown))
    else:
        _print(str(what), shown)


def _of_configuration(
    path: Path, sets: list[str], given: dict[str, Any]
) -> tuple[TrainingOptions, BaseModelReference, int]:
    from qpa.documents import AdapterSpec
    from qpa.passes.inspect_model import InspectModel
    from qpa.passes.train_generator import TrainGenerator
    from qpa.pipeline.configuration import read_configuration
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.pipeline.pipeline import Pipeline
    from qpa.store.run_directory import DirectoryStore

    configuration = read_configuration(path, sets)
    with configuration.locating_errors():
        options = configuration.make(TrainGenerator, **given)
        context = PassContext(configuration.seed, DirectoryStore(Path()))
        context = Pipeline(configuration.make(InspectModel)).run(None, context)
    return options, context.document(AdapterSpec).base, configuration.seed


def _of_run(path: Path, given: dict[str, Any]) -> tuple[TrainingOptions, BaseModelReference, int]:
    from qpa.documents import AdapterSpec, TrainedGenerator
    from qpa.errors import OptionError
    from qpa.store.run_directory import RunDirectory
    from qpa.training.training_options import TrainingOptions

    run = RunDirectory.open(path)
    spec = run.read(AdapterSpec)
    if "data" not in given:
        raise OptionError("data", "the data of the training", "none", "name its files")
    if not run.has(TrainedGenerator):
        return TrainingOptions(**given), spec.base, spec.seed
    provenance = run.read(TrainedGenerator).provenance
    options: dict[str, Any] = provenance.option_values | given
    return TrainingOptions(**options), spec.base, provenance.seed


def _json(shown: DataPreview) -> dict[str, Any]:
    return {
        "rows": [
            [[dataclasses.asdict(piece) for piece in text.pieces] for text in row] for row in shown.rows
        ],
        "n_rows": shown.n_rows,
        "max_length": shown.max_length,
        "summary": shown.summary.model_dump() if shown.summary else None,
    }


def _print(subject: str, shown: DataPreview) -> None:
    """Print rows in colours, or with brackets where the output has none."""
    from rich.console import Console

    from qpa.report.data import DATA_HEADER, data_rows

    console = Console(highlight=False, markup=False, soft_wrap=True)
    has_colours = console.is_terminal and not console.no_color
    sign = "green" if has_colours else "[[ ]]"
    if shown.rows:
        print_line(f"{subject}: {len(shown.rows)} of {shown.n_rows:,} rows; {sign}: carries the loss")
    for number, row in enumerate(shown.rows, start=1):
        for part, text in enumerate(row, start=1):
            of = f", part {part} of {len(row)}" if len(row) > 1 else ""
            print_line(f"\nrow {number}{of}: {text.n_tokens} tokens, {text.n_loss_tokens} carry the loss")
            console.print(_styled(text, has_colours=has_colours))
    if shown.summary:
        print_line("")
        print_table(f"{subject}: all of the data", data_rows(shown.summary, shown.max_length), DATA_HEADER)


def _styled(text: PreviewedText, *, has_colours: bool) -> Any:
    from rich.text import Text

    styled = Text()
    for piece in text.pieces:
        if has_colours:
            styled.append(piece.text, "bold green" if piece.has_loss else "dim")
        else:
            styled.append(f"[[{piece.text}]]" if piece.has_loss else piece.text)
    return styled


COMMAND = Command(preview, EXAMPLES, makers)
