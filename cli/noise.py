"""qpa noise: what shots, a device's noise and mitigation do to a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.bench.noise_study import NoiseStudy

EXAMPLES = """
[bold]Examples[/bold]

qpa noise runs/bard --data shakespeare.txt --out noise/bard

qpa noise runs/bard --shots 256,1024,8192,65536 --targets none,fake_torino,fake_fez --out noise/bard
"""


def makers() -> Makers:
    """Return whose options `qpa noise` takes."""
    from qpa.bench.noise_study import NoiseStudy

    return {"study": NoiseStudy}


def noise(
    run: Annotated[Path, typer.Argument(help="Run directory that qpa train has trained.")],
    out: Annotated[Path, typer.Option(help="Directory of results; one that has some is continued.")],
    study: NoiseStudy,
    json_: JsonOption = False,
) -> None:
    """Measure the trained circuits with several numbers of shots on several devices; the run stays as it is.

    Every cell is compared with the adapter that exact probabilities give, and with --data, which is that of
    the training, by its loss.
    """
    from qpa.bench.noise_study import HEADER, PLOT, TABLE, lines_of, run_study, write_study
    from qpa.documents import TrainedGenerator
    from qpa.pipeline.pass_protocol import newest
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    documents = directory.read_through(TrainedGenerator)
    with progress_bar() as progress:
        run_study(study, run, documents, out, progress)
    trained = newest(documents, TrainedGenerator)
    rows = write_study(out, trained)
    if json_:
        print_json({"run": str(run), "cells": lines_of(out, trained)})
        return
    print_table(f"{run}: what counts give, against exact probabilities", rows, HEADER)
    print_line(f"wrote {out / TABLE} and {out / PLOT}")


COMMAND = Command(noise, EXAMPLES, makers)
