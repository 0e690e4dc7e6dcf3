"""qpa init: a configuration file to fill in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpa.cli.command import Command
from qpa.cli.output import print_line

EXAMPLES = """
[bold]Examples[/bold]

qpa init > bard.yaml

qpa init --model ./models/stories260K --data shakespeare.txt --out runs/bard > bard.yaml

qpa init --set plan.max_params=25% --set train.max_steps=200 --set export.gguf.dtype=float16 > bard.yaml
"""


def init(
    model: Annotated[str | None, typer.Option(help="Base model: a local directory or a Hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Data to train on.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory to make.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option and value to fill in: train.max_steps=200; once for each."),
    ] = None,
) -> None:
    """Print a configuration file with every option, its default and what it is, for qpa run."""
    from qpa.pipeline.configuration import given_values
    from qpa.pipeline.configuration_template import template

    asked = {"model": model, "data": data, "out": None if out is None else str(out)}
    sets = [f"{name}={value}" for name, value in asked.items() if value is not None]
    print_line(template(given_values([*sets, *(set_ or ())])).rstrip("\n"))


COMMAND = Command(init, EXAMPLES)
