"""What an export is and what engines made of it, as rows for a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpa.documents import Manifest, Verification
from qpa.documents.finding import Finding, short
from qpa.documents.verification import read_verification
from qpa.errors import DocumentError
from qpa.report.facts import account_json, account_rows, adapter_words, result_json, result_rows
from qpa.report.rows import Rows, number

if TYPE_CHECKING:
    from qpa.exporters.format import Exported
    from qpa.serve.compact import Compact
    from qpa.serve.layout import Layout
    from qpa.store.tensor_file import TensorEntry

VERIFICATION_HEADER = (
    *("engine", "logits - live", "at most", "logits - base", "greedy tokens"),
    "missing or unexpected keys",
)


def verification_title(dtype: str, tolerance: float | None) -> str:
    """Return in what sense an export that passed is the trained model.

    Args:    dtype: of the export.
             tolerance: the one that was given, None for the default.
    """
    if tolerance is not None:
        return f"equal to the trained model within a tolerance of {tolerance:g}"
    if dtype != "float32":
        return f"equal to the trained model within {dtype} rounding"
    return "the same function as the trained model"


def verification_rows(verification: Verification) -> Rows:
    """Return what each engine made of the probe, under the words of `VERIFICATION_HEADER`."""
    return [
        (
            f"{check.engine} {check.version or ''}".rstrip(),
            _difference(check.max_logit_difference),
            "-" if check.bound is None else f"{check.bound:.1e}",
            _difference(check.max_base_difference),
            "equal" if check.greedy_tokens_equal else "differ",
            ", ".join((*check.missing_keys, *check.unexpected_keys)) or "none",
        )
        for check in verification.engines
    ]


def verification_json(verification: Verification) -> dict[str, Any]:
    """Return the same by name."""
    return verification.model_dump(mode="json", include={"engines", "tolerance"})


def _difference(value: float | None) -> str:
    return "no logits" if value is None else f"{value:.1e}"


def file_rows(exported: Exported) -> Rows:
    """Return the files of an export and their lengths."""
    return [(short(entry.file), f"{number(entry.n_bytes)} bytes") for entry in exported.files]


def export_rows(manifest: Manifest, findings: Sequence[Finding]) -> Rows:
    """Return what an export holds and what its contract says."""
    return [
        ("base model", short(manifest.base.name_or_path)),
        ("adapter, type", f"{adapter_words(manifest.method, manifest.rank)}, {manifest.dtype}"),
        *file_rows(manifest),
        ("contract", _contract(findings)),
        *_origin_rows(manifest),
    ]


def export_json(manifest: Manifest, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the same by name."""
    return {
        "format": manifest.format,
        "method": manifest.method,
        "base_model": manifest.base.name_or_path,
        "rank": manifest.rank,
        "dtype": manifest.dtype,
        "files": {entry.file: entry.n_bytes for entry in manifest.files},
        "findings": [str(finding) for finding in findings],
        "account": account_json(manifest.account),
        "result": result_json(manifest.result),
    }


def compact_rows(compact: Compact, layout: Layout) -> Rows:
    """Return what a compact adapter and its layout say."""
    facts = compact_json(compact, layout)
    kept = "measured probabilities" if compact.are_probabilities else "angles or other features"
    return [
        ("numbers", f"{number(facts['n_numbers'])}, {kept} first"),
        ("features", short(layout.features)),
        ("basis", f"{facts['basis']}, bank {compact.bank}"),
        ("layout", facts["layout"]),
    ]


def compact_json(compact: Compact, layout: Layout) -> dict[str, Any]:
    """Return the same by name."""
    return {
        "n_numbers": sum(map(len, compact.arrays)),
        "are_probabilities": compact.are_probabilities,
        "features": layout.features,
        "basis": compact.basis.hex(),
        "bank": compact.bank,
        "layout": compact.layout.hex(),
    }


def lora_rows(
    config: Mapping[str, object],
    tensors: Mapping[str, TensorEntry],
    findings: Sequence[Finding],
    manifest: Manifest | None,
) -> Rows:
    """Return what a LoRA directory of any origin holds and what the contract says."""
    targets = config.get("target_modules")
    names = ", ".join(short(name) for name in targets) if isinstance(targets, list) else short(targets)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    return [
        ("base model", short(config.get("base_model_name_or_path"))),
        ("rank, alpha", f"{short(config.get('r'))}, {short(config.get('lora_alpha'))}"),
        ("target modules", names),
        ("tensors", f"{len(tensors)}, {number(_n_numbers(tensors))} numbers, {dtypes}"),
        ("contract", _contract(findings)),
        *_origin_rows(manifest),
    ]


def lora_json(
    config: Mapping[str, object],
    tensors: Mapping[str, TensorEntry],
    findings: Sequence[Finding],
    manifest: Manifest | None,
) -> dict[str, Any]:
    """Return the same by name, the config whole."""
    return {
        "config": config,
        "n_tensors": len(tensors),
        "n_numbers": _n_numbers(tensors),
        "findings": [str(finding) for finding in findings],
        "account": account_json(manifest.account) if manifest else None,
        "result": result_json(manifest.result) if manifest else None,
    }


def _n_numbers(tensors: Mapping[str, TensorEntry]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def _contract(findings: Sequence[Finding]) -> str:
    return "kept" if not findings else f"{len(findings)} findings, first: {findings[0]}"


def _origin_rows(manifest: Manifest | None) -> Rows:
    if manifest is None:
        return [("made by", "unknown: no qpa/manifest.json")]
    made_by = f"qpa {manifest.provenance.qpa_version}, from {manifest.provenance.parent}"
    return [("made by", short(made_by)), *account_rows(manifest.account), *result_rows(manifest.result)]


def kept_verification_rows(directory: Path) -> Rows:
    """Return what the verification that is kept in an export says, and whether it is of this export."""
    verification = _kept_verification(directory)
    if verification is None:
        return [("verified", f"not yet: qpa verify {directory}")]
    if not verification.is_of(directory):
        return [("verified", f"stale, since it is that of another export: qpa verify {directory}")]
    return [
        (
            f"verified in {short(engine)}",
            f"logits - live {live}, at most {bound}, logits - base {base}, greedy tokens {tokens}, "
            f"missing or unexpected keys {short(keys)}",
        )
        for engine, live, bound, base, tokens, keys in verification_rows(verification)
    ]


def kept_verification_json(directory: Path) -> dict[str, Any] | None:
    """Return the same by name; None where there is no verification."""
    verification = _kept_verification(directory)
    if verification is None:
        return None
    return {"stale": not verification.is_of(directory), **verification_json(verification)}


def _kept_verification(directory: Path) -> Verification | None:
    """Return what is known of an export's verification; a damaged one is a finding of the contract."""
    try:
        return read_verification(directory)
    except DocumentError:
        return None
