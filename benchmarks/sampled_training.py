"""Training on sampled circuits: loss curves of exact, sampled and noisy circuits, for two generators.

    python -m benchmarks.sampled_training --model <stories260K> --data <tinyshakespeare input.txt> \\
        --out docs/results/sampled

Each case is `qpa plan` and `qpa train` with one seed; the curve is the training loss of metrics.jsonl, and
the table has the evaluation loss of the live adapter and of the frozen one, which is measured once more.
Gradients are adjoint where circuits are exact, and else the surrogate's. A case that is in OUT/results.jsonl
is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from qpa.bench.report import markdown_table
from qpa.documents import FrozenAdapter
from qpa.store.run_directory import METRICS, RunDirectory

GENERATORS = {
    "state": ("--generator", "state", "--layers", "5"),
    "aligned": ("--generator", "aligned", "--rank", "2", "--circuits", "4", "--layers", "4"),
}
SOURCES: dict[str, tuple[str, ...]] = {
    "exact": (),
    "1,024 shots": ("--source", "shots", "--shots", "1024"),
    "8,192 shots": ("--source", "shots", "--shots", "8192"),
    "FakeTorino, 8,192 shots": ("--source", "noisy", "--shots", "8192"),
}
TARGET = "fake_torino"
RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "loss.png"
Line = dict[str, Any]


def run_case(options: argparse.Namespace, generator: str, source: str, seed: int) -> Line:
    """Plan, train and freeze once; return the line of the results."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        plan = ("--model", options.model, "--out", run, "--seed", seed, "--device-target", TARGET)
        _qpa("plan", *plan, *GENERATORS[generator])
        _qpa("train", run, "--data", options.data, "--max-steps", options.steps, *SOURCES[source])
        frozen = RunDirectory(run).read(FrozenAdapter)
        lines = [json.loads(text) for text in (run / METRICS).read_text().splitlines()]
    return {
        "generator": generator,
        "source": source,
        "seed": seed,
        "steps": options.steps,
        "curve": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "step_executions": lines[0]["step_executions"],
        "base": frozen.result.base_loss,
        "live": frozen.result.eval_loss,
        "frozen": frozen.frozen_loss,
        "weight_error": frozen.weight_error,
    }


def _qpa(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "qpa.cli", *map(str, arguments)], check=True, stdout=sys.stderr)


def table(lines: list[Line]) -> str:
    """Return the losses of every case, means over seeds."""
    cases: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        cases[line["generator"], line["source"]].append(line)
    rows: list[tuple[str, ...]] = [
        ("generator", "circuits", "seeds", "live loss", "frozen loss", "weight error", "executions a step")
    ]
    for (generator, source), case in cases.items():
        live, frozen = ([line[name] for line in case] for name in ("live", "frozen"))
        spread = f" (sd {statistics.stdev(live):.4f})" if len(live) > 1 else ""
        error = statistics.mean(line["weight_error"] for line in case)
        rows.append(
            (
                *(generator, source, str(len(case)), f"{statistics.mean(live):.4f}{spread}"),
                *(f"{statistics.mean(frozen):.4f}", f"{error:.3f}", f"{case[0]['step_executions']:,}"),
            )
        )
    return markdown_table(rows)


def draw(lines: list[Line], path: Path) -> None:
    """Draw the training loss against steps, means over seeds, one panel for each generator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, generator in zip(figure.subplots(1, 2), GENERATORS, strict=True):
        for source in SOURCES:
            curves = [x["curve"] for x in lines if (x["generator"], x["source"]) == (generator, source)]
            if curves:
                steps = [step for step, _ in curves[0]]
                losses = [statistics.mean(loss for _, loss in points) for points in zip(*curves, strict=True)]
                panel.plot(steps, losses, label=source)
        panel.set(title=generator, xlabel="step", ylabel="training loss, nats per token")
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Run the cases that are missing, and write table and plot."""
    parser = argparse.ArgumentParser(description="Train on exact, sampled and noisy circuits.")
    parser.add_argument("--model", required=True, help="Directory of a causal language model.")
    parser.add_argument("--data", required=True, help="UTF-8 text.")
    parser.add_argument("--out", type=Path, required=True, help="Directory of results.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / RESULTS
    lines = [json.loads(text) for text in results.read_text().splitlines()] if results.is_file() else []
    done = {(line["generator"], line["source"], line["seed"]) for line in lines}
    for seed in range(options.seeds):
        for source in SOURCES:
            for generator in GENERATORS:
                if (generator, source, seed) not in done:
                    lines.append(run_case(options, generator, source, seed))
                    with results.open("a") as stream:
                        stream.write(json.dumps(lines[-1]) + "\n")
    text = table(lines)
    draw(lines, options.out / PLOT)
    (options.out / TABLE).write_text(f"# Training on sampled circuits\n\n![]({PLOT})\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
