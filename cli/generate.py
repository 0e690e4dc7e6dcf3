"""qpa generate: what the base model and the adapted model make of the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_side_by_side, progress_bar

if TYPE_CHECKING:
    from qpa.documents import Document
    from qpa.store.run_directory import RunDirectory
    from qpa.training.continuation import ContinuePrompts

EXAMPLES = """
[bold]Examples[/bold]

qpa generate runs/bard --prompt "Once"

qpa generate runs/bard --prompts prompts.txt --max-new-tokens 128 --temperature 0.8 --seed 3

qpa generate runs/bard --chat --prompt "What is a qubit?" --json
"""


def makers() -> Makers:
    """Return what has the options of generating."""
    from qpa.training.continuation import ContinuePrompts

    return {"step": ContinuePrompts}


def generate(
    run: Annotated[Path, typer.Argument(help="Run directory with a trained adapter.")],
    step: ContinuePrompts,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue; may be given several times.",
            show_default="the beginning of the evaluation split",
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.")] = None,
    json_: JsonOption = False,
) -> None:
    """Continue prompts with the base model and with the adapted model, side by side."""
    from qpa.report.samples import probe_prompt, read_prompts, samples_json
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    documents = frozen_documents(directory)
    with progress_bar() as progress:
        files = directory.files
        samples = step(documents, files, texts or [probe_prompt(documents, files)], progress)
    if json_:
        print_json({"run": str(run), "samples": samples_json(samples)})
        return
    for sample in samples:
        print_side_by_side(sample.prompt, {"base model": sample.base, "with the adapter": sample.adapted})


def frozen_documents(run: RunDirectory) -> Sequence[Document]:
    """Return the documents of a run up to its frozen adapter.

    Raises:  DirectoryError: the run is not trained.
             DocumentError: a document is damaged or stale.
    """
    from qpa.documents import FrozenAdapter, TrainedGenerator
    from qpa.errors import DirectoryError

    if not run.has(FrozenAdapter):
        command = "freeze" if run.has(TrainedGenerator) else "train"
        found = f"one without a {FrozenAdapter.file_name()}"
        raise DirectoryError(str(run.path), "a trained run", found, f"run qpa {command} {run.path} first")
    return run.read_through(FrozenAdapter)


COMMAND = Command(generate, EXAMPLES, makers)
