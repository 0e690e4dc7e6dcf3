"""What the parts of small generators contribute, over several seeds: `qpa explain`, run by run, as one table.

Cases:

    state             one quantum state with 12 layers, on stories260K 133 trained numbers
    state-control     the control "log-linear" in its circuit's place, at most as many numbers
    default           what `qpa plan` plans where nothing is asked for
    default-control   the same with a trained table in the circuits' place

    python -m benchmarks.explanations --model <stories260K> --data <tinyshakespeare input.txt> --out <runs>

Each run is planned, trained for 200 steps of 8 rows of 128 tokens and explained in a directory of its own,
which `qpa report` shows; a run that is there already is not made again. OUT/table.md has, for each case, the
means over the seeds with half their range: the interval of `qpa explain` is over rows of one run, and this is
over runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qpa.bench.report import markdown_table
from qpa.documents import Contribution, Explanation, FrozenAdapter, LogicalCircuit
from qpa.passes import explaining_pipeline, planning_pipeline, training_pipeline
from qpa.passes.explain_generator import ExplainGenerator
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.report.explanation import share_of_gain
from qpa.store.atomic_files import write_file
from qpa.store.run_directory import RunDirectory

CASES: dict[str, dict[str, Any]] = {
    "state": {"generator": "state", "layers": 12},
    "state-control": {"generator": "state", "features": "log-linear", "control_size": 132},
    "default": {},
    "default-control": {"features": "classical"},
}
SETTING: dict[str, Any] = {"max_length": 128, "batch_size": 8}
HEADER = ("part", "without it", "share of the gain", "in another order")
TABLE = "table.md"


def explained(case: str, seed: int, options: argparse.Namespace) -> Explanation:
    """Return the explanation of one run, which is made where it is not there yet."""
    path = options.out / f"{case}-{seed}"
    if not path.is_dir():
        with RunDirectory.create(path, force=False) as run:
            context = PassContext(seed, run.files)
            plan = planning_pipeline(
                InspectModel(str(options.model)), PlanLayout(**CASES[case]), TranspileCircuit()
            )
            plan.run(None, context, run.write)
    run = RunDirectory.open(path)
    if not run.has(FrozenAdapter):
        documents = run.read_through(LogicalCircuit)
        step = TrainGenerator(data=(str(options.data),), max_steps=options.steps, **SETTING)
        training_pipeline(step).run(documents[-1], PassContext(seed, run.files, documents), run.write)
    if not run.has(Explanation):
        documents = run.read_through(FrozenAdapter)
        explain = ExplainGenerator(data=(str(options.data),), rows=options.rows)
        explaining_pipeline(explain).run(documents[-1], PassContext(seed, run.files, documents), run.write)
    return run.read(Explanation)


def table_of(found: Sequence[Explanation]) -> list[tuple[str, ...]]:
    """Return a row for each part that all runs have: means over the runs, with half their range."""
    gain = statistics.mean(one.gain.value for one in found)
    return [
        ("all together", _spread([one.gain.value for one in found]), f"{1:.0%}", ""),
        *_rows(found, gain),
    ]


def _rows(found: Sequence[Explanation], gain: float) -> Iterator[tuple[str, ...]]:
    for parts in zip(*(one.parts for one in found), strict=True):
        shares = [share_of_gain(part.ablation, one) for part, one in zip(parts, found, strict=True)]
        known = [share for share in shares if share is not None]
        share = f"{statistics.mean(known):.0%}" if known else ""
        ablated, permuted = ([getattr(p, name) for p in parts] for name in ("ablation", "permutation"))
        yield parts[0].name, _spread(_values(ablated)), share, _spread(_values(permuted))


def _values(found: Sequence[Contribution | None]) -> list[float]:
    return [one.value for one in found if one is not None]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    half = f" +-{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{half}"


def main() -> None:
    """Explain the runs, and write the table."""
    parser = argparse.ArgumentParser(description="Explain what the parts of small generators contribute.")
    parser.add_argument("--model", type=Path, required=True, help="Base model.")
    parser.add_argument("--data", type=Path, required=True, help="Text to train on.")
    parser.add_argument("--out", type=Path, required=True, help="Directory of the runs and the table.")
    parser.add_argument("--cases", default=",".join(CASES), help="Cases, separated by commas.")
    parser.add_argument("--seeds", default="0,1,2", help="Seeds, separated by commas.")
    parser.add_argument("--steps", type=int, default=200, help="Optimizer steps of a training.")
    parser.add_argument("--rows", type=int, default=None, help="Rows to score; all where it is left out.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts = []
    for case in options.cases.split(","):
        found = [explained(case, int(seed), options) for seed in options.seeds.split(",")]
        losses = ", ".join(f"{one.trained_loss:.3f}" for one in found)
        words = f"{len(found)} runs, losses {losses}, of {found[0].n_tokens:,} tokens"
        texts.append(f"## {case}: {words}\n\n{markdown_table([HEADER, *table_of(found)])}\n")
        write_file(options.out / TABLE, "\n".join(texts).encode())
    print("\n".join(texts))


if __name__ == "__main__":
    main()
