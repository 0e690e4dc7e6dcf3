"""qpa run: from a configuration file to verified exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpa.cli.command import Command
from qpa.cli.output import JsonOption, print_json, progress_bar

EXAMPLES = """
[bold]Examples[/bold]

qpa run bard.yaml

qpa run bard.yaml --set train.max_steps=400 --set export=lora,merged

qpa run bard.yaml --dry-run

qpa run runs/bard/configuration.json --set out=runs/again
"""


def run(
    file: Annotated[
        Path,
        typer.Argument(help="Configuration file: YAML, see qpa init, or the configuration.json of a run."),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option and value in place of the file's: train.max_steps=200."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Do everything anew, and replace what another command has trained."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    json_: JsonOption = False,
) -> None:
    """Plan, train, freeze, export and verify as a file says; leave out what is done and unchanged.

    An interrupted training goes on where it was. Paths in the file are relative to the working directory.
    """
    from qpa.pipeline.configuration import read_configuration
    from qpa.workflow.run import run_configuration

    configuration = read_configuration(file, set_ or ())
    with progress_bar() as progress:
        done = run_configuration(
            configuration,
            say=_say_nothing if json_ else _say,
            progress=progress,
            force=force,
            dry_run=dry_run,
        )
    if json_:
        stages = [{"name": one.name, "why": one.why, "result": one.result} for one in done]
        print_json({"run": str(configuration.out), "stages": stages})


def _say(text: str) -> None:
    """Print a line at once: the next one may take hours."""
    print(text, flush=True)


def _say_nothing(_: str) -> None:
    """Leave stdout to the JSON."""


COMMAND = Command(run, EXAMPLES)
