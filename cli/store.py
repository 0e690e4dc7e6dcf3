"""qpa store: a folder with thousands of compact adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qpa.cli.command import Command
from qpa.cli.output import JsonOption, print_json, print_line, print_table

if TYPE_CHECKING:
    from qpa.serve.store import Entry, Store

EXAMPLES = """
[bold]Examples[/bold]

qpa store ls store

qpa store add store exports/tenant-17 exports/tenant-18

qpa store verify store --basis bases/llama
"""

HEADER = ("adapter", "numbers", "bytes", "basis", "layout")


def store(
    action: Annotated[Literal["ls", "add", "verify"], typer.Argument(help="What to do with the store.")],
    directory: Annotated[Path, typer.Argument(metavar="STORE", help="Folder with compact adapters.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILES]", help="Compact adapters to add, each under its own name."),
    ] = None,
    basis: Annotated[
        Path | None, typer.Option(help="Basis of which all adapters have to be, for verify.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let add replace an adapter of the same name.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """List a store's adapters, add compact files with their layouts, or check every file.

    ls reads the heads of the files alone. verify reads them whole, prints a line for everything that is
    wrong, and exits with 1 if there is anything.
    """
    from qpa.errors import OptionError
    from qpa.serve.basis import Basis
    from qpa.serve.store import Store

    if (action == "add") != bool(files):
        expected = "compact adapters to add" if action == "add" else f"no files for {action}"
        raise OptionError("store", expected, f"{len(files or ())} files")
    opened = None if basis is None else Basis.open(basis)
    if action == "add":
        _list(Store(directory).add(files or [], force=force), directory, json_)
    elif action == "ls":
        _list(list(Store.open(directory).entries()), directory, json_)
    else:
        _verify(Store.open(directory), opened, json_)


def _list(entries: list[Entry], directory: Path, json_: bool) -> None:
    from qpa.report.rows import several

    if json_:
        print_json({"store": str(directory), "adapters": [_facts(entry) for entry in entries]})
    elif entries:
        n_bytes = sum(entry.n_bytes for entry in entries)
        rows = [
            (entry.name, f"{entry.n_numbers:,}", f"{entry.n_bytes:,}", entry.basis[:12], entry.layout[:12])
            for entry in entries
        ]
        print_table(f"{several(len(rows), 'adapter')} of {n_bytes:,} bytes in {directory}", rows, HEADER)
    else:
        print_line(f"no adapters in {directory}")


def _facts(entry: Entry) -> dict[str, Any]:
    names = ("name", "n_numbers", "n_bytes", "basis", "layout")
    return {name: getattr(entry, name) for name in names}


def _verify(checked: Store, basis: Any, json_: bool) -> None:
    from qpa.report.rows import several

    findings = list(checked.verify(basis))
    n_adapters = len(checked.names())
    if json_:
        print_json({"store": str(checked.directory), "n_adapters": n_adapters, "findings": findings})
    else:
        for line in findings:
            print_line(line)
        found = several(len(findings), "finding") if findings else "no findings"
        print_line(f"{several(n_adapters, 'adapter')} in {checked.directory}: {found}")
    if findings:
        raise typer.Exit(1)


COMMAND = Command(store, EXAMPLES)
