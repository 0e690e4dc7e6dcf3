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
    from qpa.documents import AdapterSpec
    from qpa.exporters.format import Exported
    from qpa.exporters.registry import FormatChoice

EXAMPLES = """
[bold]Examples[/bold]

qpa export runs/bard --format lora --out adapters/bard

qpa export runs/bard --format merged --dtype bfloat16 --out models/bard

qpa export runs/bard --format onnx-adapter --base-graph graphs --out adapters/bard-onnx

qpa export runs/tenant-17 --format compact --dtype int16 --out store/tenant-17
"""


def makers() -> Makers:
    """Return the choice of a format, and the exporters, each of which has some of the other options."""
    from qpa.documents.manifest import FORMATS
    from qpa.exporters.registry import FormatChoice

    return {"choice": FormatChoice, "options": tuple(FORMATS[name] for name in FORMATS)}


def export(
    run: Annotated[Path, typer.Argument(help="Run directory with a trained adapter.")],
    out: Annotated[Path, typer.Option(help="Directory to make; of compact a file.")],
    choice: FormatChoice,
    options: dict[str, Any],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    json_: JsonOption = False,
) -> None:
    """Write a frozen adapter in a format that knows nothing of generators or circuits."""
    from qpa.documents import AdapterSpec, FrozenAdapter
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
        exported = exporter.emit(frozen, out, context, force=force)
    if json_:
        files = [entry.model_dump() for entry in exported.files]
        print_json({"out": str(out), "format": exported.format, "rank": exported.rank, "files": files})
        return
    _report(exported, out, _next(exported, out, options.get("model"), context.document(AdapterSpec)))


def _report(exported: Exported, out: Path, next_: str) -> None:
    from qpa.report.exports import file_rows
    from qpa.report.facts import adapter_words

    adapter = adapter_words(exported.method, exported.rank)
    title = f"{out}: {exported.format}, {adapter}, {exported.dtype}, for {exported.base.name_or_path}"
    print_table(title, file_rows(exported))
    print_line(f"wrote {out}; next: {next_}")


def _next(exported: Exported, out: Path, model: str | None, spec: AdapterSpec) -> str:
    """Return the command that verifies an export; another environment's Python is left to fill in."""
    from qpa.documents.manifest import FORMATS
    from qpa.documents.verification import ENGINES

    if FORMATS[exported.format].is_file and spec.basis is not None:
        return shlex.join(["qpa", "verify", str(out), "--basis", spec.basis.directory])
    words = ["qpa", "verify", str(out), "--model", model or exported.base.name_or_path]
    if exported.base.trust_remote_code:
        words.append("--trust-remote-code")
    engines = [ENGINES[name] for name in FORMATS[exported.format].engines]
    if not engines:
        return shlex.join(["qpa", "verify", str(out), "--static"])
    if not all(engine.own_environment for engine in engines):
        return shlex.join(words)
    words += ["--engine", engines[0].name]
    files = [f"{flag_of(file.option)} <{file.example}>" for file in engines[0].needs]
    return " ".join([shlex.join(words), *files, f"--python <python with {engines[0].package}>"])


COMMAND = Command(export, EXAMPLES, makers)
