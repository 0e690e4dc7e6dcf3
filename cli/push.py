"""qpa push: from a verified export to a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpa.cli.command import Command
from qpa.cli.output import JsonOption, print_json, print_line

EXAMPLES = """
[bold]Examples[/bold]

qpa push adapters/bard --repo me/bard
"""


def push(
    directory: Annotated[Path, typer.Argument(help="Adapter directory that qpa verify has verified.")],
    repo: Annotated[str, typer.Option(help="Repository of the Hub, such as me/bard; made if there is none.")],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a repository that is made.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Upload an export to the Hub, with the login of the Hub's own client.

    An export that is not verified is not uploaded, and no other command uploads anything.
    """
    from qpa.exporters.hub import push_export

    address = push_export(directory, repo, public=public)
    if json_:
        print_json({"directory": str(directory), "repo": repo, "commit": address})
        return
    print_line(f"pushed {directory}: {address}")


COMMAND = Command(push, EXAMPLES)
