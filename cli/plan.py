"""qpa plan: from a base model's config to a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qpa.cli.output import (
    JsonOption,
    number,
    print_json,
    print_line,
    print_table,
    progress_bar,
    split_names,
)
from qpa.cli.paused_collector import paused_collector

EXAMPLES = """
[bold]Examples[/bold]

qpa plan --model ./models/stories260K --max-params 25% --out runs/bard

qpa plan --model Qwen/Qwen3-0.6B --targets q_proj,v_proj --out runs/qv

qpa plan --model openai-community/gpt2 --generator paper --rank 4 --targets lm_head --out runs/paper

qpa plan --model ./models/stories260K --target fake_torino --out runs/torino
"""


def plan(
    model: Annotated[
        str, typer.Option(help="Base model: a local directory or a Hub id. Only its config is read.")
    ],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    method: Annotated[
        str,
        typer.Option(
            help="Kind of adapter: lora, dora, ia3, prefix (prefix tuning) or ffa (feed-forward adapter)."
        ),
    ] = "lora",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of LoRA and DoRA, tokens of a prefix, width of a feed-forward adapter.  "
            "[default: 32, or a smaller side of an adapted layer; prefix, ffa: 16]"
        ),
    ] = None,
    max_params: Annotated[
        str | None,
        typer.Option(help="Most numbers to train: 5000, or 25% of LoRA r=4. Circuits and vectors follow."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's and DoRA's alpha.  [default: 2 * rank]")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="all-linear (every linear layer but the head), or names, separated by commas.  "
            "[default: all-linear; ia3: keys, values, feed-forward; ffa: the feed-forward blocks]"
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            help="spectral: vectors shared by neighbouring layers, and factors of the gradient's directions. "
            "aligned: rows of A, columns of B from random circuits. paper: flat chunks, arXiv 2410.09846.  "
            "[default: spectral; ia3, prefix, ffa: aligned]"
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Numbers per chunk of --generator paper.  [default: 2048]")
    ] = None,
    qubits: Annotated[
        int | None, typer.Option(help="Qubits per circuit.  [default: as many as needed]")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers per circuit.  [default: 1; aligned, paper: 8]")
    ] = None,
    circuits: Annotated[
        int | None,
        typer.Option(
            "--circuits",
            "--heads",
            help="Independent circuits.  [default: one a layer; aligned: 8; paper: 1]",
        ),
    ] = None,
    vectors: Annotated[
        str,
        typer.Option(help="Kinds of layers that get vectors besides their spectrum: all, none, or names."),
    ] = "all",
    features: Annotated[
        str,
        typer.Option(help="circuit, or a control in its place: classical, random (angles frozen), bits."),
    ] = "circuit",
    target: Annotated[
        str,
        typer.Option(
            help="Device to transpile to: none, generic:<qubits>, or a fake backend such as fake_torino."
        ),
    ] = "none",
    seed: Annotated[int, typer.Option(help="Draws lora_A and the angles, and seeds the transpiler.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing run.")] = False,
    json_: JsonOption = False,
) -> None:
    """Plan an adapter: its tensors, the layout of its generator, and the circuit, for a target device."""
    from qpa.passes import planning_pipeline
    from qpa.passes.inspect_model import InspectModel
    from qpa.passes.plan_layout import PlanLayout
    from qpa.passes.transpile_circuit import TranspileCircuit
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.store.run_directory import RunDirectory

    pipeline = planning_pipeline(
        InspectModel(
            model=model,
            rank=rank,
            alpha=alpha,
            targets=None if targets is None else split_names(targets),
            method=method,
            revision=revision,
            trust_remote_code=trust_remote_code,
        ),
        PlanLayout(
            generator=generator,
            features=features,
            chunk_size=chunk_size,
            qubits=qubits,
            layers=layers,
            circuits=circuits,
            vectors=split_names(vectors),
            max_params=max_params,
        ),
        TranspileCircuit(target=target),
    )
    with RunDirectory.create(out, force=force) as run, progress_bar() as progress, paused_collector():
        context = pipeline.run(None, PassContext(seed, run.files, (), progress), run.write)
    if max_params is not None and not json_:
        _explain(context)
    _report(out, context, json_)


def _explain(context: Any) -> None:
    """Show the size that was chosen among its neighbours, and what each is expected to cost."""
    from qpa.documents import WeightLayout

    layout = context.document(WeightLayout)
    rows = [
        (
            f"{'*' if size.is_chosen else ' '} {size.words}",
            f"{number(size.n_trained)} trained, loss {size.loss_difference:+.2f}",
        )
        for size in layout.sizes
    ]
    title = (
        f"largest plan (*) within {number(layout.budget)} trained numbers, its neighbours, "
        "and the loss to expect"
    )
    print_table(f"{title}, nats per token", rows)


def _report(out: Path, context: Any, as_json: bool) -> None:
    from qpa.documents import AdapterSpec, NativeCircuit, WeightLayout
    from qpa.report.facts import account_json, account_rows, adapter_words, circuit_json, circuit_rows

    spec = context.document(AdapterSpec)
    layout, native = context.document(WeightLayout), context.document(NativeCircuit)
    if as_json:
        print_json(
            {
                "run": str(out),
                "model": spec.base.name_or_path,
                "method": spec.method,
                "rank": spec.rank,
                "alpha": spec.alpha,
                "target_modules": list(spec.target_modules),
                "account": account_json(layout.account),
                "circuit": circuit_json(layout, native),
            }
        )
        return
    words = adapter_words(spec.method, spec.rank, spec.target_modules)
    alpha = f", alpha {spec.alpha:g}" if spec.pairs else ""
    print_table(
        f"{spec.base.name_or_path} ({spec.base.architecture}): {words}{alpha}",
        circuit_rows(layout, native) + account_rows(layout.account),
    )
    print_line(f"wrote {out}; next: qpa train {out} --data <text or jsonl>")
