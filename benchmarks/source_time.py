"""What a training step costs on each source: the circuits forward, and the surrogate's gradient.

    python -m benchmarks.source_time

The sources take turns in one process, one torch thread, with 8,192 shots. The transpiled circuit and the
noise model are made once, before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.sampled_circuits import circuit_on
from qpa.bench.report import markdown_table
from qpa.circuits.circuit import Circuit
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.surrogate import Surrogate
from qpa.circuits.sources.source import SOURCES, SourceSettings

SHOTS = 8192
CASES = ((7, 8, 1), (7, 8, 16), (11, 5, 1))


def step_of(circuit: Circuit, name: str, target: str, n_circuits: int) -> Callable[[], None]:
    """Return a function that runs the circuits once, and pulls a gradient back."""
    backend = target if name == "backend" else None
    settings = SourceSettings(0, None if name == "exact" else SHOTS, backend)
    gradient = Adjoint() if name == "exact" else Surrogate()
    execution = Execution(circuit, SOURCES[name](settings), gradient)
    random = torch.Generator().manual_seed(0)
    angles = torch.randn(n_circuits, circuit.n_angles, generator=random, requires_grad=True)

    def step() -> None:
        torch.autograd.backward(execution.run(angles)[:, 0].sum())
        angles.grad = None

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time a step on every source.")
    parser.add_argument("--target", default="fake_torino")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = [("qubits x layers", "circuits", "source", "step, s", "step / exact")]
    for n_qubits, n_layers, n_circuits in CASES:
        circuit = circuit_on(options.target, n_qubits, n_layers)
        names = ("exact", "shots", "noisy", "backend")
        steps = {name: step_of(circuit, name, options.target, n_circuits) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            steps[name]()  # makes the noise model
        for _ in range(options.rounds):
            for name in names:
                started = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - started)
        exact = statistics.median(times["exact"])
        for name in names:
            middle = statistics.median(times[name])
            spread = f"{middle:.3g} ({min(times[name]):.3g} .. {max(times[name]):.3g})"
            shape = f"{n_qubits} x {n_layers}"
            rows.append((shape, str(n_circuits), name, spread, f"{middle / exact:,.0f}"))
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
