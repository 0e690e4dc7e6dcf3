"""qpa basis: the directions of a base model, once for many adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, progress_bar

if TYPE_CHECKING:
    from qpa.documents import Document
    from qpa.passes.calibrate_basis import CalibrateBasis
    from qpa.passes.inspect_model import InspectModel

EXAMPLES = """
[bold]Examples[/bold]

qpa basis --model ./models/stories260K --data shakespeare.txt --out bases/stories

qpa basis --model Qwen/Qwen3-0.6B --data support.jsonl,law.jsonl,code.jsonl --rank 16 --batches 32
"""


def makers() -> Makers:
    """Return the passes whose options `qpa basis` takes."""
    from qpa.passes.calibrate_basis import CalibrateBasis
    from qpa.passes.inspect_model import InspectModel

    return {"inspect": InspectModel, "step": CalibrateBasis}


def basis(
    inspect: InspectModel,
    step: CalibrateBasis,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to make.", show_default="bases/, the model's name and the start of the digest"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws lora_A, the rows, and what finds the directions.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Read the directions in which a model's loss falls, once for all adapters that share them.

    Each name of --data is a kind of text and gets directions of its own; an adapter's training finds out
    which of them suit its data.

    qpa plan --basis DIR plans an adapter on them. Then qpa export --format compact keeps its trained numbers
    alone, and qpa expand makes a plain LoRA of these.
    """
    from qpa.documents import SharedBasis
    from qpa.passes import basis_pipeline
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.serve.basis import Basis
    from qpa.store.atomic_files import check_absent, new_directory
    from qpa.store.run_directory import DirectoryStore

    if out is not None:
        check_absent(out)

    def keep(document: Document) -> None:
        files.put(document.file_name(), document.to_json())

    with TemporaryDirectory() as beside, progress_bar() as progress:
        files = DirectoryStore(Path(beside))
        context = PassContext(seed, files, (), progress)
        made = basis_pipeline(inspect, step).run(None, context, keep)
        digest = Basis.open(Path(beside)).digest.hex()
        place = out or Path("bases") / f"{Path(inspect.model).name}-{digest[:12]}"
        with new_directory(place, keep_existing=out is None) as work:
            shutil.copytree(beside, work, dirs_exist_ok=True)
    document = made.document(SharedBasis)
    n = len(document.tensors) // 2
    if json_:
        names = [bank.name for bank in document.banks]
        n_bytes = document.arrays.n_bytes
        print_json({"basis": str(place), "digest": digest, "layers": n, "banks": names, "bytes": n_bytes})
        return
    kinds = ", ".join(bank.name for bank in document.banks)
    size = f"{document.arrays.n_bytes:,} bytes"
    print_line(f"directions of {n} layers for {kinds}; {size}, digest {digest[:12]}")
    print_line(f"wrote {place}; next: qpa plan --model {inspect.model} --basis {place} --out <run>")


COMMAND = Command(basis, EXAMPLES, makers)
