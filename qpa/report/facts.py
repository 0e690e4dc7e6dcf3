"""What a run or an export says about itself, as rows for a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qpa.cli.output import number
from qpa.documents import (
    METHOD_NAMES,
    Method,
    NativeCircuit,
    ParameterAccount,
    TrainingResult,
    Verification,
    WeightLayout,
)
from qpa.documents.trained_generator import perplexity, perplexity_text

Rows = list[tuple[str, ...]]

VERIFICATION_HEADER = (
    *("engine", "logits - live", "logits - base", "greedy tokens"),
    "missing or unexpected keys",
)


def adapter_words(method: Method, rank: int, targets: Iterable[str] = ()) -> str:
    """Return an adapter's kind, size and place in a few words."""
    name, names = METHOD_NAMES[method], ", ".join(targets)
    places = f" on {names}" if names else ""
    return {
        "ia3": f"{name}{places}",
        "prefix": f"{name}, {rank} tokens in every layer",
        "ffa": f"{name} of width {rank}{places}",
    }.get(method, f"{name} rank {rank}{places}")


def account_rows(account: ParameterAccount) -> Rows:
    """Return the parameter account: angles, decoder, total, the adapter's own, percent."""
    return [
        ("circuit angles", number(account.n_angles)),
        ("decoder", number(account.n_decoder)),
        ("generator, trained", number(account.n_generator)),
        ("the adapter's own (m)", number(account.n_adapter)),
        ("generator / adapter", f"{account.percent:.2f} %"),
    ]


def account_json(account: ParameterAccount) -> dict[str, Any]:
    """Return the parameter account with its derived numbers."""
    return {**account.model_dump(), "n_generator": account.n_generator, "percent": account.percent}


def circuit_rows(layout: WeightLayout, native: NativeCircuit) -> Rows:
    """Return the layout's circuit and what the target makes of it."""
    probability = native.estimated_success_probability
    return [
        ("generator", layout.generator),
        ("chunks", number(layout.n_chunks)),
        ("circuits", number(layout.n_circuits)),
        ("qubits x layers", f"{layout.ansatz.n_qubits} x {layout.ansatz.n_layers}"),
        ("target", native.target),
        ("depth", number(native.depth)),
        ("two-qubit gates", number(native.n_two_qubit_gates)),
        ("success probability", "not reported" if probability is None else f"{probability:.3f}"),
    ]


def circuit_json(layout: WeightLayout, native: NativeCircuit) -> dict[str, Any]:
    """Return the same numbers by name."""
    return {
        "generator": layout.generator,
        "n_chunks": layout.n_chunks,
        "n_circuits": layout.n_circuits,
        "n_qubits": layout.ansatz.n_qubits,
        "n_layers": layout.ansatz.n_layers,
        "target": native.target,
        "depth": native.depth,
        "n_two_qubit_gates": native.n_two_qubit_gates,
        "estimated_success_probability": native.estimated_success_probability,
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


def verification_rows(verification: Verification) -> Rows:
    """Return what each engine made of the probe, under the words of `VERIFICATION_HEADER`."""
    return [
        (
            f"{check.engine} {check.version or ''}".rstrip(),
            _difference(check.max_logit_difference),
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
