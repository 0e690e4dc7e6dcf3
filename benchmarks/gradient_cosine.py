"""How near the estimators' gradients are to the exact one, against shots, and what they cost.

    python -m benchmarks.gradient_cosine

For random angles and cotangents of one circuit: the cosine to the exact gradient, medians over draws, without
noise and with that of a device; the circuits and executions of one step, forward and back.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.sampled_circuits import circuit_on
from qpa.bench.report import markdown_table
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.estimator import GRADIENTS
from qpa.circuits.sources.exact import ExactSimulator
from qpa.circuits.sources.source import SOURCES, SourceSettings

ESTIMATORS = ("surrogate", "parameter-shift", "spsa")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare estimators of gradients.")
    parser.add_argument("--qubits", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--target", default="fake_torino")
    parser.add_argument("--shots", default="256,1024,8192", help="Numbers, separated by commas.")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    circuit = circuit_on(options.target, options.qubits, options.layers)
    rows: list[tuple[str, ...]] = [
        ("estimator", "source", "shots", "cosine to exact, median (least .. most)", "circuits", "executions")
    ]
    for source_name in ("shots", "noisy"):
        for shots in map(int, options.shots.split(",")):
            for name in ESTIMATORS:
                found = []
                for draw in range(options.draws):
                    random = torch.Generator().manual_seed(draw)
                    angles = torch.randn(1, circuit.n_angles, generator=random)
                    cotangent = torch.randn(1, circuit.n_states, generator=random)
                    source = SOURCES[source_name](SourceSettings(draw, shots))
                    measured = source.probabilities(circuit, angles)
                    estimate = GRADIENTS[name](draw).vjp(source, circuit, angles, measured, cotangent)
                    exact = Adjoint().vjp(ExactSimulator(), circuit, angles, measured, cotangent)
                    found.append(float(torch.cosine_similarity(estimate, exact)[0]))
                cost = Execution(circuit, source, GRADIENTS[name](0)).step_cost(1)
                middle = f"{statistics.median(found):.4f} ({min(found):.3f} .. {max(found):.3f})"
                rows.append(
                    (
                        name,
                        source_name,
                        f"{shots:,}",
                        middle,
                        f"{cost.n_circuits:,}",
                        f"{cost.n_executions:,}",
                    )
                )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
