"""qpa inspect: what is in a run or in an adapter directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpa.cli.output import JsonOption, number, print_json, print_table

if TYPE_CHECKING:
    from qpa.documents import Document, Manifest, Verification
    from qpa.store.run_directory import RunDirectory

EXAMPLES = """
[bold]Examples[/bold]

qpa inspect runs/bard

qpa inspect adapters/bard --json
"""


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Run directory, export of any format, or LoRA directory of any origin.")
    ],
    json_: JsonOption = False,
) -> None:
    """Show what a run or an adapter directory holds, and whether it is whole."""
    from qpa.documents import MANIFEST_PATH, AdapterSpec, read_manifest
    from qpa.documents.manifest import FORMATS
    from qpa.errors import DocumentError
    from qpa.exporters.contracts.lora import CONFIG_FILE
    from qpa.store.run_directory import RunDirectory

    manifest = read_manifest(path) if (path / MANIFEST_PATH).is_file() else None
    if (path / AdapterSpec.file_name()).is_file():
        _inspect_run(RunDirectory(path), json_)
    elif manifest is not None and not FORMATS[manifest.format].any_origin:
        _inspect_export(path, manifest, json_)
    elif (path / CONFIG_FILE).is_file():
        _inspect_adapter(path, json_)
    else:
        found = "neither" if path.is_dir() else "no such directory"
        raise DocumentError(str(path), "a run (adapter-spec.json) or an adapter (adapter_config.json)", found)


def _inspect_run(run: RunDirectory, as_json: bool) -> None:
    from qpa.documents import AdapterSpec, FrozenAdapter, NativeCircuit, WeightLayout
    from qpa.pipeline.stages import STAGES
    from qpa.report import facts as summary

    documents: tuple[Document, ...] = ()
    for stage in STAGES:
        if run.has(stage.document):
            documents = run.read_through(stage.document)
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
        "method": spec.method,
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
        (kind.kind, _stage(by_kind[kind]) if kind in by_kind else "not made yet")
        for kind in (stage.document for stage in STAGES)
    ]
    adapter = summary.adapter_words(spec.method, spec.rank)
    print_table(f"{run.path}: {adapter} for {spec.base.name_or_path}", stages + rows)


def _stage(document: Document) -> str:
    return f"{document.digest[:19]}  by {document.provenance.pass_name}, seed {document.provenance.seed}"


def _inspect_export(path: Path, manifest: Manifest, as_json: bool) -> None:
    from qpa.exporters.contracts.export import check_contract
    from qpa.exporters.contracts.manifest import short
    from qpa.report import facts as summary

    findings = [str(finding) for finding in check_contract(path)]
    content: dict[str, Any] = {
        "export": str(path),
        "format": manifest.format,
        "method": manifest.method,
        "base_model": manifest.base.name_or_path,
        "rank": manifest.rank,
        "dtype": manifest.dtype,
        "files": {entry.file: entry.n_bytes for entry in manifest.files},
        "findings": findings,
        "account": summary.account_json(manifest.account),
        "result": summary.result_json(manifest.result),
        "verification": _verification_json(path),
    }
    if as_json:
        print_json(content)
        return
    rows: summary.Rows = [
        ("base model", short(manifest.base.name_or_path)),
        ("adapter, type", f"{summary.adapter_words(manifest.method, manifest.rank)}, {manifest.dtype}"),
        *((short(entry.file), f"{number(entry.n_bytes)} bytes") for entry in manifest.files),
        ("contract", _contract(findings)),
    ]
    print_table(f"{path}: {manifest.format}", rows + _manifest_rows(manifest) + _verification_rows(path))


def _contract(findings: list[str]) -> str:
    return "kept" if not findings else f"{len(findings)} findings, first: {findings[0]}"


def _inspect_adapter(path: Path, as_json: bool) -> None:
    from qpa.documents import MANIFEST_PATH, read_manifest
    from qpa.exporters.contracts.lora import check_lora_contract, read_config, read_tensor_file
    from qpa.exporters.contracts.manifest import short
    from qpa.report import facts as summary

    findings = check_lora_contract(path)
    config, tensors = read_config(path), read_tensor_file(path).entries
    manifest = read_manifest(path) if (path / MANIFEST_PATH).is_file() else None
    n_numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
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
                "verification": _verification_json(path) if manifest else None,
            }
        )
        return
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    rows = [
        *_config_rows(config),
        ("tensors", f"{len(tensors)}, {number(n_numbers)} numbers, {dtypes}"),
        ("contract", _contract([str(finding) for finding in findings])),
    ]
    verified = _verification_rows(path) if manifest else []
    title = f"{path}: {short(config.get('peft_type', 'adapter'))}"
    print_table(title, rows + _manifest_rows(manifest) + verified)


def _config_rows(config: dict[str, object]) -> list[tuple[str, ...]]:
    from qpa.exporters.contracts.manifest import short

    targets = config.get("target_modules")
    names = ", ".join(short(name) for name in targets) if isinstance(targets, list) else short(targets)
    return [
        ("base model", short(config.get("base_model_name_or_path"))),
        ("rank, alpha", f"{short(config.get('r'))}, {short(config.get('lora_alpha'))}"),
        ("target modules", names),
    ]


def _manifest_rows(manifest: Manifest | None) -> list[tuple[str, ...]]:
    from qpa.exporters.contracts.manifest import short
    from qpa.report import facts as summary

    if manifest is None:
        return [("made by", "unknown: no qpa/manifest.json")]
    made_by = f"qpa {manifest.provenance.qpa_version}, from {manifest.provenance.parent}"
    return [
        ("made by", short(made_by)),
        *summary.account_rows(manifest.account),
        *summary.result_rows(manifest.result),
    ]


def _verification(path: Path) -> Verification | None:
    """Return what is known of an export's verification; a damaged one is a finding of the contract."""
    from qpa.documents.verification import read_verification
    from qpa.errors import DocumentError

    try:
        return read_verification(path)
    except DocumentError:
        return None


def _verification_json(path: Path) -> dict[str, Any] | None:
    from qpa.report.facts import verification_json

    verification = _verification(path)
    if verification is None:
        return None
    return {"stale": not verification.is_of(path), **verification_json(verification)}


def _verification_rows(path: Path) -> list[tuple[str, ...]]:
    from qpa.exporters.contracts.manifest import short
    from qpa.report.facts import verification_rows

    verification = _verification(path)
    if verification is None:
        return [("verified", f"not yet: qpa verify {path}")]
    if not verification.is_of(path):
        return [("verified", f"stale, it is of another export: qpa verify {path}")]
    return [
        (
            f"verified in {short(engine)}",
            f"logits - live {live}, logits - base {base}, greedy tokens {tokens}, "
            f"missing or unexpected keys {short(keys)}",
        )
        for engine, live, base, tokens, keys in verification_rows(verification)
    ]
