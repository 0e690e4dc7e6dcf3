"""qpa bench: methods that train few parameters, compared on the user's model and text."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.output import print_line, split_names

if TYPE_CHECKING:
    from qpa.bench.task import Setting

EXAMPLES = """
[bold]Examples[/bold]

qpa bench --model ./models/stories260K --data shakespeare.txt --out bench/bard

qpa bench --model ./models/stories260K --data shakespeare.txt --budgets 8%,25%,1850
--methods qpa,lora,vera --seeds 2 --minutes 30 --out bench/bard   (again, to go on)

qpa bench --model ./models/stories260K --data shakespeare.txt --budgets 8%,25% --ablate --out bench/parts

qpa bench --report --out bench/bard
"""


def bench(
    out: Annotated[Path, typer.Option(help="Directory of results; one that has some is continued.")],
    model: Annotated[str | None, typer.Option(help="Base model: a local directory or a Hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="UTF-8 text to train on.")] = None,
    eval_: Annotated[
        Path | None, typer.Option("--eval", help="Test text.  [default: a tenth of --data, held out]")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Trained parameters: shares of LoRA r=4's, or numbers, separated by commas.")
    ] = "4%,8%,17%,25%,52%",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "qpa,lora,vera,unilora",
    seeds: Annotated[int, typer.Option(help="Runs that each mean is over.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Blocks per step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per block.")] = 128,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast; what is trained stays float32.")] = False,
    test_share: Annotated[float, typer.Option(help="Share of the test text that is scored.")] = 1.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear (every linear layer but the head), or names, separated by commas.")
    ] = "all-linear",
    ablate: Annotated[
        bool, typer.Option("--ablate", help="qpa with its parts left out or replaced, instead of --methods.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Worker processes, of one thread each.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Start no run after this time; the same command goes on.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Only draw the table and plot of --out again.")
    ] = False,
) -> None:
    """Tune and train each method at the same numbers of trained parameters, and compare their test losses."""
    if not report:
        _check(model, data, seeds, jobs)
        from qpa.bench.methods import ABLATION
        from qpa.bench.task import Setting
        from qpa.models.base_model import torch_device

        chosen = ABLATION if ablate else split_names(methods)
        setting = Setting(
            model=str(model),
            data=Path(str(data)),
            eval_data=eval_,
            targets=split_names(target_modules),
            steps=steps,
            batch_size=batch_size,
            length=length,
            bf16=bf16,
            test_share=test_share,
            device=torch_device(device),
        )
        if not _run(setting, out, split_names(budgets), chosen, seeds, jobs, minutes):
            return
    _report(out)


def _check(model: str | None, data: Path | None, seeds: int, jobs: int) -> None:
    from qpa.errors import OptionError

    for option, given in (("--model", model), ("--data", data)):
        if given is None:
            raise OptionError(option, "a value", "none", "or pass --report to draw existing results")
    for option, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value < 1:
            raise OptionError(option, "a whole number of at least 1", str(value))


def _run(
    setting: Setting,
    out: Path,
    budgets: tuple[str, ...],
    methods: tuple[str, ...],
    n_seeds: int,
    n_jobs: int,
    minutes: float | None,
) -> bool:
    """Run what time allows; return whether there is a run to report."""
    started_s = time.monotonic()
    from qpa.bench.ledger import Book
    from qpa.bench.methods import find_methods
    from qpa.bench.schedule import Grid, plan_cells, record_plan
    from qpa.bench.sizes import parse_budgets
    from qpa.bench.task import load_task

    chosen = find_methods(methods)
    task = load_task(setting)
    goals = parse_budgets(budgets, task.n_reference)
    with Book.opened(out, task.facts) as book:
        cells, unmet = plan_cells(task.base, chosen, goals)
        record_plan(book, goals, unmet)
        deadline_s = math.inf if minutes is None else started_s + 60 * minutes
        n_left = Grid(task, cells, book, n_seeds, n_jobs, deadline_s).run()
    if n_left:
        print(f"{n_left} runs are left; the same command goes on", file=sys.stderr)
    return any(line["kind"] == "run" for line in book.lines)


def _report(out: Path) -> None:
    from qpa.bench.report import PLOT, TABLE, write_report

    print_line(write_report([out], out).rstrip())
    print_line(f"wrote {out / TABLE} and {out / PLOT}")
