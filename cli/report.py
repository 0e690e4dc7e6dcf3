"""qpa report: one page that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import print_line, progress_bar

if TYPE_CHECKING:
    from qpa.training.continuation import ContinuePrompts

EXAMPLES = """
[bold]Examples[/bold]

qpa report runs/bard

qpa report runs/bard --export adapters/bard --export adapters/bard-gguf --prompt "Once" --out bard.html
"""


def makers() -> Makers:
    """Return what has the options of the samples."""
    from qpa.training.continuation import ContinuePrompts

    return {"step": ContinuePrompts}


def report(
    run: Annotated[Path, typer.Argument(help="Run directory, trained or only planned.")],
    step: ContinuePrompts,
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="report.html in the run")
    ] = None,
    export: Annotated[
        list[Path] | None, typer.Option(help="Export of this run to show; may be given several times.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue before and after; may be given several times.",
            show_default="the beginning of the evaluation split",
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.")] = None,
) -> None:
    """Write one self-contained HTML page that shows a run: results, circuit, weights, how to load it."""
    from qpa.report.page.write import write_report
    from qpa.report.samples import read_prompts
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    with progress_bar() as progress:
        path = write_report(
            directory, out, exports=export or (), prompts=texts, options=step, progress=progress
        )
    print_line(f"wrote {path}")


COMMAND = Command(report, EXAMPLES, makers)
