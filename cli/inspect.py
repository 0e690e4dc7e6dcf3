"""qpa inspect: what is in a run or in an adapter directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.output import JsonOption, number, print_json, print_table

if TYPE_CHECKING:
    from qpa.documents import Document, Manifest
    from qpa.run_directory import RunDirectory

EXAMPLES = """
[bold]Examples[/bold]

qpa inspect runs/bard

qpa inspect adapters/bard --json
"""


def inspect(
    path: Annotated[Path, typer.Argument(help="Run directory, or adapter directory of any origin.")],
    json_: JsonOption = False,
) -> None:
    """Show what a run or an adapter directory holds, and whether it is whole."""
    from qpa.documents import AdapterSpec
    from qpa.errors import DocumentError
    from qpa.exporters.lora_contract import CONFIG_FILE
    from qpa.run_directory import RunDirectory

    if (path / AdapterSpec.file_name()).is_file():
        _inspect_run(RunDirectory(path), json_)
    elif (path / CONFIG_FILE).is_file():
        _inspect_adapter(path, json_)
    else:
        found = "neither" if path.is_dir() else "no such directory"
        raise DocumentError(str(path), "a run (adapter-spec.json) or an adapter (adapter_config.json)", found)


def _inspect_run(run: RunDirectory, as_json: bool) -> None:
    from qpa.cli import summary
    from qpa.documents import AdapterSpec, FrozenAdapter, NativeCircuit, WeightLayout
    from qpa.run_directory import STAGES

    documents: tuple[Document, ...] = ()
    for stage in STAGES:
        if run.has(stage):
            documents = run.read_through(stage)
    by_kind = {type(document): document for document in documents}
    spec, layout, native = by_kind[AdapterSpec], by_kind.get(WeightLayout), by_kind.get(NativeCircuit)
    frozen = by_kind.get(FrozenAdapter)
    content: dict[str, Any] = {
        "run": str(run.path),
        "stages": {document.kind: document.digest for document in documents},
    }
    rows: summary.Rows = []
    assert isinstance(spec, AdapterSpec)
    content |= {
        "model": spec.base.name_or_path,
        "rank": spec.rank,
        "target_modules": list(spec.target_modules),
    }
    if isinstance(layout, WeightLayout) and isinstance(native, NativeCircuit):
        rows += summary.circuit_rows(layout, native) + summary.account_rows(layout.account)
        content |= {
            "circuit": summary.circuit_json(layout, native),
            "account": summary.account_json(layout.account),
        }
    if isinstance(frozen, FrozenAdapter):
        rows += summary.result_rows(frozen.result)
        content["result"] = summary.result_json(frozen.result)
    if as_json:
        print_json(content)
        return
    stages = [
        (stage.kind, _stage(by_kind[stage]) if stage in by_kind else "not made yet") for stage in STAGES
    ]
    print_table(f"{run.path}: LoRA rank {spec.rank} for {spec.base.name_or_path}", stages + rows)


def _stage(document: Document) -> str:
    return f"{document.digest[:19]}  by {document.provenance.pass_name}, seed {document.provenance.seed}"


def _inspect_adapter(path: Path, as_json: bool) -> None:
    from qpa.cli import summary
    from qpa.documents import MANIFEST_PATH, read_manifest
    from qpa.exporters.lora_contract import check_lora_contract

    findings = check_lora_contract(path)
    config, tensors = _read_adapter(path)
    manifest = read_manifest(path) if (path / MANIFEST_PATH).is_file() else None
    n_numbers = sum(math.prod(shape) for shape, _ in tensors.values())
    if as_json:
        print_json(
            {
                "adapter": str(path),
                "config": config,
                "n_tensors": len(tensors),
                "n_numbers": n_numbers,
                "findings": [str(finding) for finding in findings],
                "account": summary.account_json(manifest.account) if manifest else None,
                "result": summary.result_json(manifest.result) if manifest else None,
            }
        )
        return
    dtypes = ", ".join(sorted({dtype for _, dtype in tensors.values()}))
    rows = [
        *_config_rows(config),
        ("tensors", f"{len(tensors)}, {number(n_numbers)} numbers, {dtypes}"),
        ("contract", "kept" if not findings else f"{len(findings)} findings, first: {findings[0]}"),
    ]
    print_table(f"{path}: {config.get('peft_type', 'adapter')}", rows + _manifest_rows(manifest))


def _read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, tuple[list[int], str]]]:
    from safetensors import SafetensorError, safe_open

    from qpa.errors import DocumentError
    from qpa.exporters.lora_contract import CONFIG_FILE, WEIGHTS_FILE

    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
        with safe_open(path / WEIGHTS_FILE, framework="numpy") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            tensors = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (ValueError, SafetensorError, FileNotFoundError) as error:
        raise DocumentError(
            str(path), "a whole adapter directory", str(error), f"see qpa verify {path} --static"
        ) from error
    if not isinstance(config, dict):
        raise DocumentError(str(path / CONFIG_FILE), "a JSON object", type(config).__name__)
    return config, tensors


def _config_rows(config: dict[str, object]) -> list[tuple[str, ...]]:
    targets = config.get("target_modules")
    names = ", ".join(str(name) for name in targets) if isinstance(targets, list) else str(targets)
    return [
        ("base model", str(config.get("base_model_name_or_path"))),
        ("rank, alpha", f"{config.get('r')}, {config.get('lora_alpha')}"),
        ("target modules", names),
    ]


def _manifest_rows(manifest: Manifest | None) -> list[tuple[str, ...]]:
    from qpa.cli import summary

    if manifest is None:
        return [("made by", "unknown: no qpa/manifest.json")]
    made_by = ("made by", f"qpa {manifest.provenance.qpa_version}, from {manifest.provenance.parent}")
    return [made_by, *summary.account_rows(manifest.account), *summary.result_rows(manifest.result)]
