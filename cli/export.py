"""qpa export: from a frozen adapter to files that serving engines load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.flags import flag_of
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.documents import Manifest
    from qpa.exporters.compact import Written
    from qpa.exporters.registry import FormatChoice

EXAMPLES = """
[bold]Examples[/bold]

qpa export runs/bard --format lora --out adapters/bard

qpa export runs/bard --format merged --dtype bfloat16 --out models/bard

qpa export runs/bard --format onnx-adapter --base-graph graphs --out adapters/bard-onnx

qpa export runs/tenant-17 --format compact --numbers int16 --out store/tenant-17
"""


def makers() -> Makers:
    """Return the choice of a format, and the exporters, each of which has some of the other options."""
    from qpa.documents.manifest import FORMATS
    from qpa.exporters.compact import ExportCompact
    from qpa.exporters.registry import FormatChoice

    return {"choice": FormatChoice, "options": (*(FORMATS[name] for name in FORMATS), ExportCompact)}


def export(
    run: Annotated[Path, typer.Argument(help="Run directory with a trained adapter.")],
    out: Annotated[Path, typer.Option(help="Directory to make; of compact a file.")],
    choice: FormatChoice,
    options: dict[str, Any],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    json_: JsonOption = False,
) -> None:
    """Write a frozen adapter in a format that knows nothing of generators or circuits."""
    from qpa.documents import FrozenAdapter, Manifest
    from qpa.exporters.registry import exporter_for
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.store.run_directory import RunDirectory

    exporter = exporter_for(choice.format, options)
    directory = RunDirectory.open(run)
    documents = directory.read_through(FrozenAdapter)
    frozen = documents[-1]
    assert isinstance(frozen, FrozenAdapter)
    with progress_bar() as progress:
        context = PassContext(frozen.provenance.seed, directory.files, documents, progress)
        manifest = exporter.emit(frozen, out, context, force=force)
    if not isinstance(manifest, Manifest):
        _report_compact(manifest, as_json=json_)
        return
    if json_:
        files = [entry.model_dump() for entry in manifest.files]
        print_json({"out": str(out), "format": manifest.format, "rank": manifest.rank, "files": files})
        return
    _report(manifest, out, options.get("model"))


def _report_compact(written: Written, *, as_json: bool) -> None:
    if as_json:
        files = [{"file": str(written.path), "n_bytes": written.n_bytes}, {"file": str(written.layout)}]
        print_json({"out": str(written.path), "format": "compact", "files": files})
        return
    what = "numbers, with the measured probabilities" if written.keeps_probabilities else "numbers"
    print_line(f"{written.n_numbers:,} {what}, in {written.n_bytes:,} bytes; layout {written.layout}")
    next_ = f"qpa expand {written.path} --basis <basis> --out <directory>"
    print_line(f"wrote {written.path}; next: {next_}")


def _report(manifest: Manifest, out: Path, model: str | None) -> None:
    from qpa.report.exports import file_rows
    from qpa.report.facts import adapter_words

    adapter = adapter_words(manifest.method, manifest.rank)
    title = f"{out}: {manifest.format}, {adapter}, {manifest.dtype}, for {manifest.base.name_or_path}"
    print_table(title, file_rows(manifest))
    print_line(f"wrote {out}; next: {_next(manifest, out, model)}")


def _next(manifest: Manifest, out: Path, model: str | None) -> str:
    """Return the command that verifies an export; another environment's Python is left to fill in."""
    from qpa.documents.manifest import FORMATS
    from qpa.documents.verification import ENGINES

    words = ["qpa", "verify", str(out), "--model", model or manifest.base.name_or_path]
    if manifest.base.trust_remote_code:
        words.append("--trust-remote-code")
    engines = [ENGINES[name] for name in FORMATS[manifest.format].engines]
    if not engines:
        return shlex.join(["qpa", "verify", str(out), "--static"])
    if not all(engine.own_environment for engine in engines):
        return shlex.join(words)
    words += ["--engine", engines[0].name]
    files = [f"{flag_of(file.option)} <{file.example}>" for file in engines[0].needs]
    return " ".join([shlex.join(words), *files, f"--python <python with {engines[0].package}>"])


COMMAND = Command(export, EXAMPLES, makers)
