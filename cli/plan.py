"""qpa plan: from a base model's config to a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar
from qpa.cli.paused_collector import paused_collector
from qpa.cli.transpile import SelectOption, report_selection, select_and_transpile, selected_json

if TYPE_CHECKING:
    from qpa.passes.inspect_model import InspectModel
    from qpa.passes.plan_layout import PlanLayout
    from qpa.passes.transpile_circuit import TranspileCircuit
    from qpa.pipeline.pass_protocol import PassContext

EXAMPLES = """
[bold]Examples[/bold]

qpa plan --model ./models/stories260K --max-params 25% --out runs/bard

qpa plan --model Qwen/Qwen3-0.6B --targets q_proj,v_proj --out runs/qv

qpa plan --model openai-community/gpt2 --generator paper --rank 4 --targets lm_head --out runs/paper

qpa plan --model ./models/stories260K --device-target fake_torino --out runs/torino

qpa plan --model ./models/stories260K --device-target fake_torino --select --out runs/selected
"""


def makers() -> Makers:
    """Return the passes whose options `qpa plan` takes."""
    from qpa.passes.inspect_model import InspectModel
    from qpa.passes.plan_layout import PlanLayout
    from qpa.passes.transpile_circuit import TranspileCircuit

    return {"inspect": InspectModel, "layout": PlanLayout, "transpile": TranspileCircuit}


def plan(
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    inspect: InspectModel,
    layout: PlanLayout,
    transpile: TranspileCircuit,
    seed: Annotated[int, typer.Option(help="Draws lora_A and the angles, and seeds the transpiler.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing run.")] = False,
    select: SelectOption = False,
    json_: JsonOption = False,
) -> None:
    """Plan an adapter: its tensors, the layout of its generator, and the circuit, for a target device."""
    from qpa.passes import planning_pipeline
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.report.facts import plan_json
    from qpa.store.run_directory import RunDirectory

    pipeline = planning_pipeline(inspect, layout, transpile)
    with RunDirectory.create(out, force=force) as run, progress_bar() as progress, paused_collector():
        context = pipeline.run(None, PassContext(seed, run.files, (), progress), run.write)
        if select:
            context = select_and_transpile(transpile, context, run)
    if json_:
        print_json({"run": str(out), **plan_json(context.documents), **selected_json(context.documents)})
        return
    _report(out, context)


def _report(out: Path, context: PassContext) -> None:
    from qpa.documents import WeightLayout
    from qpa.report.facts import plan_rows, plan_title, size_rows, size_title

    layout = context.document(WeightLayout)
    if layout.sizes:
        print_table(size_title(layout), size_rows(layout))
    report_selection(context.documents)
    print_table(plan_title(context.documents), plan_rows(context.documents))
    print_line(f"wrote {out}; next: qpa train {out} --data <file>")


COMMAND = Command(plan, EXAMPLES, makers)
