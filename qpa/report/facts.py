"""What a run says about itself, as rows for a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qpa.adapters.registry import KINDS
from qpa.documents import (
    AdapterSpec,
    Document,
    FrozenAdapter,
    LeftOut,
    Measurement,
    NativeCircuit,
    ParameterAccount,
    TrainedGenerator,
    TrainingResult,
    WeightLayout,
)
from qpa.documents.trained_generator import perplexity, perplexity_text
from qpa.models.quantization import QUANTIZATIONS
from qpa.pipeline.pass_protocol import newest
from qpa.report.circuits import (
    circuit_rows,
    measurement_json,
    measurement_rows,
    transpiled_json,
)
from qpa.report.data import data_text
from qpa.report.rows import Rows, number


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


def frozen_rows(documents: Sequence[Document]) -> Rows:
    """Return what a frozen adapter gained, how it was measured, and its account."""
    frozen = newest(documents, FrozenAdapter)
    rows = result_rows(frozen.result) + measurement_rows(documents) + account_rows(frozen.account)
    return [*_data_rows(documents), *_bank_rows(documents), *context_rows(documents), *rows]


def context_rows(documents: Sequence[Document]) -> Rows:
    """Return the loss of every context after the training, and which of them is frozen."""
    trained, frozen = newest(documents, TrainedGenerator), newest(documents, FrozenAdapter)
    rows: Rows = [
        (f"loss on {one.name}", f"{one.base_loss:.4f} -> {one.eval_loss:.4f}") for one in trained.contexts
    ]
    return rows if frozen.context is None else [*rows, ("frozen for the context", frozen.context)]


def _data_rows(documents: Sequence[Document]) -> Rows:
    data = newest(documents, TrainedGenerator).data
    return [("data", data_text(data))] if data else []


def _bank_rows(documents: Sequence[Document]) -> Rows:
    """Return whose directions the adapter has, where a basis gives them."""
    bank = newest(documents, TrainedGenerator).bank
    if bank is None or bank.slope_share is None:
        return []
    steep = f"{bank.slope_share:.0%} as steep as the data's own"
    return [("directions of", f"{bank.name} (bank {bank.number}), {steep}")]


def _bank_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name; nothing where no basis gives directions."""
    bank = newest(documents, TrainedGenerator).bank
    return {"bank": bank.model_dump()} if bank else {}


def _data_json(documents: Sequence[Document]) -> dict[str, Any] | None:
    data = newest(documents, TrainedGenerator).data
    return data.model_dump() if data else None


def frozen_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name."""
    frozen = newest(documents, FrozenAdapter)
    return {
        "account": account_json(frozen.account),
        "data": _data_json(documents),
        "measurement": measurement_json(documents),
        "result": result_json(frozen.result),
        **_bank_json(documents),
        **_context_json(documents),
    }


def _context_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name; nothing where the generator has one adapter only."""
    trained, frozen = newest(documents, TrainedGenerator), newest(documents, FrozenAdapter)
    if frozen.context is None:
        return {}
    losses = {one.name: {"base_loss": one.base_loss, "eval_loss": one.eval_loss} for one in trained.contexts}
    return {"context": frozen.context, "contexts": losses}


def result_rows(result: TrainingResult) -> Rows:
    """Return losses before and after, and over how many tokens."""
    rows: Rows = [("optimizer steps", number(result.n_steps))]
    if result.frozen_step != result.n_steps:
        rows.append(("frozen as after step", number(result.frozen_step)))
    rows += [
        ("tokens in training split", number(result.n_train_tokens)),
        ("evaluation tokens", number(result.n_eval_tokens)),
    ]
    if result.quantization is not None:
        rows.append(("base in training", QUANTIZATIONS[result.quantization].words))
    if result.has_perplexity:
        return [
            *rows,
            ("base loss, perplexity", loss_text(result.base_loss)),
            ("adapted loss, perplexity", loss_text(result.eval_loss)),
        ]
    return [
        *rows,
        (f"{result.objective} loss before, after", f"{result.base_loss:.4f}  {result.eval_loss:.4f}"),
        *((f"{s.name} before, after", f"{s.base:.4f}  {s.adapted:.4f}") for s in result.scores),
    ]


def result_json(result: TrainingResult) -> dict[str, Any]:
    """Return the result, with perplexities where there are any."""
    if not result.has_perplexity:
        return result.model_dump()
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
    words = adapter_words(spec.method, spec.rank, spec.target_modules + spec.target_parameters)
    return f"{spec.base.name_or_path} ({spec.base.architecture}): {words}{alpha}"


def plan_rows(documents: Sequence[Document]) -> Rows:
    """Return what a plan leaves out, its circuit and its account."""
    layout, spec = newest(documents, WeightLayout), newest(documents, AdapterSpec)
    left_out: Rows = [("left out", left_out_words(left)) for left in spec.left_out]
    return left_out + circuit_rows(layout, newest(documents, NativeCircuit)) + account_rows(layout.account)


def left_out_words(left: LeftOut) -> str:
    """Return in one line which layers an adapter is not on, and why."""
    return f"{left.layers} ({left.n_layers}): {left.reason}"


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
        rows += _data_rows(documents) + _bank_rows(documents) + context_rows(documents)
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
        content |= {"data": _data_json(documents), **_bank_json(documents)}
        content |= _context_json(documents)
        if Measurement in kinds:
            content["measurement"] = measurement_json(documents)
    return content


def _spec_json(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "model": spec.base.name_or_path,
        "method": spec.method,
        "rank": spec.rank,
        "target_modules": list(spec.target_modules),
        "target_parameters": list(spec.target_parameters),
        "left_out": [left.model_dump() for left in spec.left_out],
    }


def _layout_json(documents: Sequence[Document]) -> dict[str, Any]:
    layout = newest(documents, WeightLayout)
    return {"account": account_json(layout.account), "circuit": transpiled_json(documents)}


def _made_by(document: Document) -> str:
    return f"{document.digest[:19]}  by {document.provenance.pass_name}, seed {document.provenance.seed}"
