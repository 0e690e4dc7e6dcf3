"""What a run or an export says about itself, as rows for a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpa.adapters.registry import KINDS
from qpa.circuits.circuit import NO_DEVICE
from qpa.circuits.sources.source import DEFAULT_SHOTS, Cost, jobs_for
from qpa.circuits.targets import RESET_S, Device, median_errors
from qpa.documents import (
    AdapterSpec,
    Document,
    FrozenAdapter,
    Manifest,
    Measurement,
    NativeCircuit,
    ParameterAccount,
    TrainingResult,
    Verification,
    WeightLayout,
)
from qpa.documents.finding import Finding, short
from qpa.documents.trained_generator import perplexity, perplexity_text
from qpa.documents.verification import read_verification
from qpa.errors import DocumentError
from qpa.pipeline.pass_protocol import newest

if TYPE_CHECKING:
    from qpa.store.tensor_file import TensorEntry

Rows = list[tuple[str, ...]]

VERIFICATION_HEADER = (
    *("engine", "logits - live", "at most", "logits - base", "greedy tokens"),
    "missing or unexpected keys",
)


def number(value: int) -> str:
    """Write an integer with thousands separators."""
    return f"{value:,}"


def adapter_words(method: str, rank: int, targets: Iterable[str] = ()) -> str:
    """Return an adapter's kind, size and place in a few words."""
    names = ", ".join(targets)
    return KINDS[method].words(rank) + (f" on {names}" if names else "")


def account_rows(account: ParameterAccount) -> Rows:
    """Return the parameter account: what is trained and its total, the adapter's own, percent."""
    return [
        *((words, number(n_trained)) for words, n_trained in account.trained),
        ("generator, trained", number(account.n_generator)),
        ("the adapter's own (m)", number(account.n_adapter)),
        ("generator / adapter", f"{account.percent:.2f} %"),
    ]


def account_json(account: ParameterAccount) -> dict[str, Any]:
    """Return the parameter account with its derived numbers."""
    return {**account.model_dump(), "n_generator": account.n_generator, "percent": account.percent}


def circuit_rows(layout: WeightLayout, native: NativeCircuit) -> Rows:
    """Return the layout's circuit and what the target makes of it, or the control in the circuit's place."""
    rows = [
        ("generator", layout.generator),
        ("features", layout.features.kind),
        ("chunks", number(layout.n_chunks)),
    ]
    if not layout.features.has_circuits:
        return [*rows, ("circuits", "none, a control in their place")]
    return [
        *rows,
        ("circuits", number(layout.n_circuits)),
        ("ansatz", layout.ansatz.kind),
        ("qubits x layers", f"{layout.ansatz.n_qubits} x {layout.ansatz.n_layers}"),
        *native_rows(native),
        *_step_rows(layout, native),
    ]


def native_rows(native: NativeCircuit) -> Rows:
    """Return what the circuit is on its target."""
    probability, length_s = native.estimated_success_probability, native.duration_s
    rows: Rows = [
        ("target", native.target),
        ("depth", number(native.depth)),
        ("two-qubit gates", number(native.n_two_qubit_gates)),
        ("success probability", "not reported" if probability is None else f"{probability:.3f}"),
    ]
    if native.physical_qubits:
        rows.append(("physical qubits", " ".join(map(str, native.physical_qubits))))
    if native.calibrated:
        rows.append(("calibrated", native.calibrated))
    if native.lacks_last_layer:
        rows.append(("last entangling layer", "applied to the counts, exactly"))
    if length_s is not None:
        rows.append(("duration of a run", f"{1e6 * length_s:.1f} us"))
    return rows


def _step_rows(layout: WeightLayout, native: NativeCircuit) -> Rows:
    """Return what a training step would cost on the target, with the default number of shots."""
    if native.target == NO_DEVICE:
        return []
    n_circuits = layout.n_circuits
    rows: Rows = []
    for name, n_shifted in (("surrogate", 0), ("spsa", 2), ("parameter-shift", 2 * layout.ansatz.n_angles)):
        n_runs = n_circuits * (1 + n_shifted)
        n_jobs = sum(jobs_for(n, DEFAULT_SHOTS) for n in (n_circuits, n_circuits * n_shifted) if n)
        cost = Cost(n_runs, n_runs * DEFAULT_SHOTS, n_jobs)
        time_s = cost.n_executions * ((native.duration_s or 0.0) + RESET_S)
        rows.append((f"a step, {name}", f"{cost_text(cost)}, about {time_s:,.1f} s on the device"))
    return rows


def cost_text(cost: Cost) -> str:
    """Return what is run, in words."""
    circuits, jobs = (
        f"{number(n)} {word}{'' if n == 1 else 's'}"
        for n, word in ((cost.n_circuits, "circuit"), (cost.n_jobs, "job"))
    )
    return f"{circuits}, {number(cost.n_executions)} executions in {jobs}"


DEVICE_HEADER = ("target", "qubits", "gates", "two-qubit error", "readout error", "calibrated")


def device_rows(devices: Sequence[Device]) -> Rows:
    """Return the size and the errors of devices, under the words of `DEVICE_HEADER`."""
    return [
        (
            facts["target"],
            number(facts["n_qubits"]),
            " ".join(facts["gates"]),
            *("-" if facts[name] is None else f"{facts[name]:.2e}" for name in _ERRORS),
            (facts["calibrated"] or "-")[:10],
        )
        for facts in map(device_json, devices)
    ]


_ERRORS = ("median_two_qubit_error", "median_readout_error")


def device_json(device: Device) -> dict[str, Any]:
    """Return the same by name."""
    target = device.target
    errors = dict(zip(_ERRORS, median_errors(target), strict=True))
    gates = sorted(name for name in target.operation_names if name not in _NO_GATES)
    return {
        "target": device.name,
        "n_qubits": target.num_qubits,
        "gates": gates,
        "calibrated": device.calibrated,
        **errors,
    }


_NO_GATES = ("measure", "reset", "delay", "if_else", "for_loop", "switch_case", "while_loop", "break_loop")


def measurement_rows(documents: Sequence[Document]) -> Rows:
    """Return what was measured for a frozen adapter, and how far it is from the exact one."""
    measurement, frozen = newest(documents, Measurement), newest(documents, FrozenAdapter)
    rows: Rows = [("circuits measured by", measurement.backend or measurement.source)]
    if measurement.shots is None:
        return rows
    rows += [
        ("target", measurement.target),
        ("shots of a circuit", number(measurement.shots)),
        ("seed", str(measurement.provenance.seed)),
        ("mitigation", measurement.mitigation),
        ("executions", number(measurement.n_executions)),
        ("distance to exact", f"{measurement.distance:.4f}, largest total variation"),
    ]
    if frozen.weight_error is not None:
        rows.append(("relative weight error", f"{frozen.weight_error:.4f}"))
    if frozen.frozen_loss is not None:
        change = frozen.frozen_loss - frozen.result.eval_loss
        rows.append(("frozen loss", f"{frozen.frozen_loss:.4f}, {change:+.4f} against the live adapter"))
    for name in ("counts", "circuit", "device"):
        attachment = getattr(measurement, name)
        if attachment is not None:
            rows.append((name, f"{attachment.file[:16]}..{attachment.file[64:]}"))
    return rows


def measurement_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name."""
    measurement, frozen = newest(documents, Measurement), newest(documents, FrozenAdapter)
    return {
        **measurement.model_dump(mode="json", exclude={"provenance"}),
        "seed": measurement.provenance.seed,
        "weight_error": frozen.weight_error,
        "frozen_loss": frozen.frozen_loss,
    }


def frozen_rows(documents: Sequence[Document]) -> Rows:
    """Return what a frozen adapter gained, how it was measured, and its account."""
    frozen = newest(documents, FrozenAdapter)
    return result_rows(frozen.result) + measurement_rows(documents) + account_rows(frozen.account)


def frozen_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name."""
    frozen = newest(documents, FrozenAdapter)
    return {
        "account": account_json(frozen.account),
        "measurement": measurement_json(documents),
        "result": result_json(frozen.result),
    }


def circuit_json(layout: WeightLayout, native: NativeCircuit) -> dict[str, Any]:
    """Return the same numbers by name."""
    return {
        "generator": layout.generator,
        "features": layout.features.kind,
        "n_chunks": layout.n_chunks,
        "n_circuits": layout.n_circuits,
        "n_qubits": layout.ansatz.n_qubits,
        "n_layers": layout.ansatz.n_layers,
        "ansatz": layout.ansatz.kind,
        "target": native.target,
        "depth": native.depth,
        "n_two_qubit_gates": native.n_two_qubit_gates,
        "estimated_success_probability": native.estimated_success_probability,
        "physical_qubits": list(native.physical_qubits),
        "calibrated": native.calibrated,
        "lacks_last_layer": native.lacks_last_layer,
        "duration_s": native.duration_s,
    }


def result_rows(result: TrainingResult) -> Rows:
    """Return losses before and after, and over how many tokens."""
    return [
        ("optimizer steps", number(result.n_steps)),
        ("tokens in training split", number(result.n_train_tokens)),
        ("evaluation tokens", number(result.n_eval_tokens)),
        ("base loss, perplexity", loss_text(result.base_loss)),
        ("adapted loss, perplexity", loss_text(result.eval_loss)),
    ]


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


def result_json(result: TrainingResult) -> dict[str, Any]:
    """Return the result with its perplexities."""
    return {
        **result.model_dump(),
        "base_perplexity": perplexity(result.base_loss),
        "eval_perplexity": perplexity(result.eval_loss),
    }


def loss_text(loss: float) -> str:
    """Write a loss in nats per token and its perplexity."""
    return f"{loss:.4f}  {perplexity_text(loss)}"


def size_rows(layout: WeightLayout) -> Rows:
    """Return the sizes a layout was chosen among, the chosen one marked, with the loss expected of each."""
    return [
        (
            f"{'*' if size.is_chosen else ' '} {size.words}",
            f"{number(size.n_trained)} trained, loss {size.loss_difference:+.2f}",
        )
        for size in layout.sizes
    ]


def size_title(layout: WeightLayout) -> str:
    """Return the title of the table of sizes."""
    words = "its neighbours, and the loss to expect, nats per token"
    return f"largest plan (*) within {number(layout.budget or 0)} trained numbers, {words}"


def plan_title(documents: Sequence[Document]) -> str:
    """Return what a plan adapts, and how."""
    spec = newest(documents, AdapterSpec)
    alpha = f", alpha {spec.alpha:g}" if spec.pairs else ""
    words = adapter_words(spec.method, spec.rank, spec.target_modules)
    return f"{spec.base.name_or_path} ({spec.base.architecture}): {words}{alpha}"


def plan_rows(documents: Sequence[Document]) -> Rows:
    """Return the circuit and the account of a plan."""
    layout = newest(documents, WeightLayout)
    return circuit_rows(layout, newest(documents, NativeCircuit)) + account_rows(layout.account)


def transpiled_rows(documents: Sequence[Document]) -> Rows:
    """Return what a device makes of a run's circuit."""
    return circuit_rows(newest(documents, WeightLayout), newest(documents, NativeCircuit))


def transpiled_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name."""
    return circuit_json(newest(documents, WeightLayout), newest(documents, NativeCircuit))


def plan_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return what a plan adapts, its circuit and its account."""
    spec = newest(documents, AdapterSpec)
    return {**_spec_json(spec), "alpha": spec.alpha, **_layout_json(documents)}


def run_title(documents: Sequence[Document]) -> str:
    """Return the adapter of a run, and its base model."""
    spec = newest(documents, AdapterSpec)
    return f"{adapter_words(spec.method, spec.rank)} for {spec.base.name_or_path}"


def run_rows(documents: Sequence[Document], stages: Iterable[type[Document]]) -> Rows:
    """Return a run's stages, made or not, and the facts of those that are made."""
    made = {type(document): document for document in documents}
    rows: Rows = [
        (stage.kind, _made_by(made[stage]) if stage in made else "not made yet") for stage in stages
    ]
    if NativeCircuit in made:
        rows += plan_rows(documents)
    if FrozenAdapter in made:
        rows += result_rows(newest(documents, FrozenAdapter).result)
        if Measurement in made:
            rows += measurement_rows(documents)
    return rows


def run_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the digests of a run's documents, and the facts they hold."""
    kinds = {type(document) for document in documents}
    content: dict[str, Any] = {"stages": {document.kind: document.digest for document in documents}}
    content |= _spec_json(newest(documents, AdapterSpec))
    if NativeCircuit in kinds:
        content |= _layout_json(documents)
    if FrozenAdapter in kinds:
        content["result"] = result_json(newest(documents, FrozenAdapter).result)
        if Measurement in kinds:
            content["measurement"] = measurement_json(documents)
    return content


def _spec_json(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "model": spec.base.name_or_path,
        "method": spec.method,
        "rank": spec.rank,
        "target_modules": list(spec.target_modules),
    }


def _layout_json(documents: Sequence[Document]) -> dict[str, Any]:
    layout = newest(documents, WeightLayout)
    return {"account": account_json(layout.account), "circuit": transpiled_json(documents)}


def _made_by(document: Document) -> str:
    return f"{document.digest[:19]}  by {document.provenance.pass_name}, seed {document.provenance.seed}"


def file_rows(manifest: Manifest) -> Rows:
    """Return the files of an export and their lengths."""
    return [(short(entry.file), f"{number(entry.n_bytes)} bytes") for entry in manifest.files]


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
