"""Tables for people, JSON for machines, and a progress bar where stderr is a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.progress import bar_of_progress, lines_of_progress

if TYPE_CHECKING:
    from qpa.progress import Progress

_WIDE = 100
"""Columns of a terminal in which two texts have room beside each other."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object with sorted keys to stdout."""
    print(json.dumps(content, sort_keys=True, indent=2))


def print_table(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print a title and rows as an aligned table, indented by two."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    table = Table(show_header=bool(header), box=None, pad_edge=False)
    for index in range(len(rows[0])):
        table.add_column(header[index] if header else "", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print(title)
    Console(highlight=False, markup=False).print(Padding(table, (0, 0, 0, 2)))


def print_side_by_side(title: str, texts: Mapping[str, str]) -> None:
    """Print texts under their names: in columns of a wide terminal, else one below the other."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from qpa.report.samples import printable

    console = Console(highlight=False, markup=False)
    blocks = [
        Padding(Text.assemble((name, "bold"), "\n", printable(text)), (0, 0, 1, 2))
        for name, text in texts.items()
    ]
    console.print(Text(printable(title), "italic"))
    if console.width < _WIDE:
        console.print(*blocks, sep="")
    else:
        console.print(Columns(blocks, width=console.width // len(blocks) - 2))


def print_line(text: str) -> None:
    """Print one line to stdout."""
    print(text)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a progress function that draws a bar on stderr, or where that is no terminal prints lines."""
    if not sys.stderr.isatty():
        yield lines_of_progress(time.monotonic, lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    words = (TextColumn("{task.description}"), TextColumn("{task.fields[words]}"))
    columns = (words[0], BarColumn(), MofNCompleteColumn(), words[1])
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar_of_progress(time.monotonic, bar)


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a list separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
