"""qpa bench: methods that train few parameters, compared on the user's model and text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import print_line

if TYPE_CHECKING:
    from qpa.bench.setting import Extent

EXAMPLES = """
[bold]Examples[/bold]

qpa bench --model ./models/stories260K --data shakespeare.txt --out bench/bard

qpa bench --model ./models/stories260K --data shakespeare.txt --budgets 8%,25%,1850
--methods qpa,lora,vera --seeds 2 --minutes 30 --out bench/bard   (again, to go on)

qpa bench --model ./models/stories260K --data shakespeare.txt --budgets 8%,25% --ablate --out bench/parts

qpa bench --report --out bench/bard --beside bench/few
"""


def makers() -> Makers:
    """Return whose options `qpa bench` takes; where it only reports, those of a setting may be missing."""
    from qpa.bench.setting import Extent, Setting

    return {"setting": (Setting,), "extent": Extent}


def bench(
    out: Annotated[Path, typer.Option(help="Directory of results; one that has some is continued.")],
    setting: dict[str, Any],
    extent: Extent,
    report: Annotated[
        bool, typer.Option("--report", help="Only draw the table and plot of --out again.")
    ] = False,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Other results of the same setting, to be reported as well.")
    ] = None,
) -> None:
    """Tune and train each method at the same numbers of trained parameters, and compare their test losses."""
    if not report and not _compare(setting, extent, out):
        return
    from qpa.bench.report import PLOT, TABLE, write_report

    print_line(write_report([out, *(beside or ())], out).rstrip())
    print_line(f"wrote {out / TABLE} and {out / PLOT}")


def _compare(given: dict[str, Any], extent: Extent, out: Path) -> bool:
    """Make the runs that are missing; return whether there is one to report."""
    from qpa.errors import OptionError

    for name in ("model", "data"):
        if name not in given:
            raise OptionError(name, "a value", "none", "or pass --report to draw existing results")
    from qpa.bench.comparison import compare
    from qpa.bench.setting import Setting

    n_left, has_runs = compare(Setting(**given), extent, out)
    if n_left:
        print(f"{n_left} runs are left; the same command goes on", file=sys.stderr)
    return has_runs


COMMAND = Command(bench, EXAMPLES, makers)
