"""qpa inspect: what is in a run or in an adapter directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command
from qpa.cli.output import JsonOption, print_json, print_line, print_table
from qpa.cli.transpile import report_selection, selected_json

if TYPE_CHECKING:
    from qpa.documents import Document, Manifest
    from qpa.report.trainability import Trainability
    from qpa.store.run_directory import RunDirectory

EXAMPLES = """
[bold]Examples[/bold]

qpa inspect runs/bard

qpa inspect runs/bard --gradients

qpa inspect adapters/bard --json

qpa inspect store/tenant-17
"""


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Run directory, export of any format, LoRA directory of any origin, or compact adapter."
        ),
    ],
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Of a run, also show how far the angles of its circuits move their features: gradients by "
            "layer and by qubits, and independent directions, at the start and at random angles. It takes a "
            "few seconds.",
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Show what a run or an adapter directory holds, and whether it is whole."""
    from qpa.compat.peft_ import CONFIG_FILE
    from qpa.documents import MANIFEST_PATH, AdapterSpec, read_manifest
    from qpa.documents.manifest import FORMATS
    from qpa.errors import DocumentError, OptionError
    from qpa.serve.compact import is_compact
    from qpa.store.run_directory import RunDirectory

    manifest = read_manifest(path) if (path / MANIFEST_PATH).is_file() else None
    if (path / AdapterSpec.file_name()).is_file():
        _show_run(RunDirectory(path), gradients=gradients, as_json=json_)
    elif gradients and path.exists():
        raise OptionError("gradients", "a run, since an adapter has no circuits", str(path))
    elif manifest is not None and not FORMATS[manifest.format].any_origin:
        _show_export(path, manifest, as_json=json_)
    elif (path / CONFIG_FILE).is_file():
        _show_lora(path, manifest, as_json=json_)
    elif is_compact(path):
        _show_compact(path, as_json=json_)
    else:
        found = "neither" if path.exists() else "no such directory"
        raise DocumentError(str(path), "a run (adapter-spec.json) or an adapter (adapter_config.json)", found)


def _show_run(run: RunDirectory, *, gradients: bool, as_json: bool) -> None:
    from qpa.pipeline.stages import STAGES
    from qpa.report.facts import run_json, run_rows, run_title
    from qpa.report.trainability import trainability_json

    stages = [stage.document for stage in STAGES if run.has(stage.document) or not stage.is_optional]
    documents: tuple[Document, ...] = ()
    for stage in stages:
        if run.has(stage):
            documents = run.read_through(stage)
    selected = _selection(run)
    found = _trainability(documents) if gradients else None
    if as_json:
        content = {"run": str(run.path), **run_json(documents), **selected_json(selected)}
        print_json(content | {"gradients": found and trainability_json(found)} if gradients else content)
        return
    print_table(f"{run.path}: {run_title(documents)}", run_rows(documents, stages))
    report_selection(selected)
    if gradients:
        _show_trainability(found)


def _selection(run: RunDirectory) -> tuple[Document, ...]:
    """Return the selection that chose how the run's circuit is transpiled, where one did."""
    from qpa.documents import Selection

    path = run.path / Selection.file_name()
    return (Selection.from_json(path.read_bytes(), str(path)),) if path.is_file() else ()


def _trainability(documents: Sequence[Document]) -> Trainability | None:
    """Return what is known of a run's circuits; None where it has none."""
    from qpa.documents import WeightLayout
    from qpa.report.trainability import trainability_of

    layouts = [document for document in documents if isinstance(document, WeightLayout)]
    return trainability_of(layouts[-1]) if layouts else None


def _show_trainability(found: Trainability | None) -> None:
    from qpa.report import trainability as report

    if found is None:
        print_line("gradients: none, since the run has no circuits")
        return
    print_table(report.layers_title(found), report.layers_rows(found), report.LAYERS_HEADER)
    print_table(report.expressivity_title(found), report.expressivity_rows(found), report.EXPRESSIVITY_HEADER)
    print_table(report.qubits_title(found), report.qubits_rows(found), report.QUBITS_HEADER)


def _show_export(path: Path, manifest: Manifest, *, as_json: bool) -> None:
    from qpa.exporters.contracts.export import check_contract
    from qpa.report.exports import export_json, export_rows, kept_verification_json, kept_verification_rows

    findings = check_contract(path)
    if as_json:
        verification = kept_verification_json(path)
        print_json({"export": str(path), "verification": verification, **export_json(manifest, findings)})
    else:
        rows = export_rows(manifest, findings) + kept_verification_rows(path)
        print_table(f"{path}: {manifest.format}", rows)


def _show_lora(path: Path, manifest: Manifest | None, *, as_json: bool) -> None:
    from qpa.documents.finding import short
    from qpa.exporters.contracts.lora import check_lora_contract, read_config, read_tensor_file
    from qpa.report.exports import kept_verification_json, kept_verification_rows, lora_json, lora_rows

    findings = check_lora_contract(path)
    config, tensors = read_config(path), read_tensor_file(path).entries
    if as_json:
        verification = kept_verification_json(path) if manifest else None
        content = lora_json(config, tensors, findings, manifest)
        print_json({"adapter": str(path), "verification": verification, **content})
        return
    title = short(config.get("peft_type", "adapter"))
    verified = kept_verification_rows(path) if manifest else []
    print_table(f"{path}: {title}", lora_rows(config, tensors, findings, manifest) + verified)


def _show_compact(path: Path, *, as_json: bool) -> None:
    from qpa.report.exports import compact_json, compact_rows
    from qpa.serve.expansion import read

    compact, layout = read(path)
    if as_json:
        print_json({"adapter": str(path), **compact_json(compact, layout)})
        return
    print_table(f"{path}: trained numbers of an adapter", compact_rows(compact, layout))


COMMAND = Command(inspect, EXAMPLES)
