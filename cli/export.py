"""qpa export: from a frozen adapter to files that serving engines load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpa.cli.output import JsonOption, number, print_json, print_line, print_table

EXAMPLES = """
[bold]Examples[/bold]

qpa export runs/bard --format lora --out adapters/bard
"""


def export(
    run: Annotated[Path, typer.Argument(help="Run directory with a trained adapter.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    format_: Annotated[
        str, typer.Option("--format", help="lora: a directory for PEFT, transformers, vLLM.")
    ] = "lora",
    allow_tied_head: Annotated[
        bool,
        typer.Option(
            "--allow-tied-head", help="Export a LoRA on a tied lm_head: right unmerged, wrong merged."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    json_: JsonOption = False,
) -> None:
    """Write a frozen adapter in a format that knows nothing of generators or circuits."""
    from qpa.documents import FrozenAdapter
    from qpa.errors import OptionError
    from qpa.exporters.lora import ExportLora
    from qpa.pipeline import PassContext
    from qpa.run_directory import RunDirectory

    if format_ != "lora":
        raise OptionError("--format", "lora", format_)
    directory = RunDirectory.open(run)
    documents = directory.read_through(FrozenAdapter)
    frozen = documents[-1]
    assert isinstance(frozen, FrozenAdapter)
    context = PassContext(frozen.provenance.seed, directory.files, documents)
    manifest = ExportLora(allow_tied_head=allow_tied_head).emit(frozen, out, context, force=force)
    if json_:
        files = [entry.model_dump() for entry in manifest.files]
        print_json({"out": str(out), "format": manifest.format, "rank": manifest.rank, "files": files})
        return
    rows = [(entry.file, f"{number(entry.n_bytes)} bytes") for entry in manifest.files]
    print_table(f"{out}: LoRA rank {manifest.rank} for {manifest.base.name_or_path}", rows)
    print_line(f"wrote {out}; next: qpa verify {out} --model {manifest.base.name_or_path}")
