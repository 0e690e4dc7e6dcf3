"""Gradients and independent directions of circuits by the number of qubits: of sqrt(p 2^N + 0.01), and of p.

Measured by exact simulation, on one thread: mean squares of gradients over all angles and basis states, and
over draws of angles (`qpa.circuits.trainability`), where angles are drawn uniformly ("random") and where the
circuit is in the uniform state but for the noise that generators add to their start ("start"). At random
angles a mean square is the gradient's variance. "x 4^N" is p's, at random angles, in the scale of p 2^N.
Directions are the independent ones in which the angles of one circuit move its 2^N features; spread is the
features' standard deviation over basis states.

    python -m benchmarks.trainability [--ansatze ry-cnot-chain efficient-su2] [--qubits 4 5 ..] [--layers 8]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.paired import markdown
from qpa.circuits.ansatz import kind_of, make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.trainability import expressivity_at, gradients_at, uniform_angles
from qpa.documents import Ansatz
from qpa.generators.features.circuit import WINDOW_NOISE
from qpa.serve.features import FEATURE_EPSILON

HEADER = (
    *("ansatz", "N", "angles", "feature, start", "feature, random", "p, start", "p, random", "x 4^N"),
    *("directions, start", "directions, random", "spread, random"),
)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description="Gradients and directions of circuits by qubits.")
    parser.add_argument("--ansatze", nargs="+", default=["ry-cnot-chain", "efficient-su2"])
    parser.add_argument("--qubits", type=int, nargs="+", default=[*range(4, 15)])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--draws", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    rows = [
        row_of(make_ansatz(kind, n_qubits, options.layers), options.draws)
        for kind in options.ansatze
        for n_qubits in options.qubits
    ]
    words = f"{options.layers} layers, {options.draws} draws, {time.perf_counter() - started_s:.0f} s"
    print(f"torch {torch.__version__}, {words}\n")
    print(markdown(HEADER, rows))


def row_of(ansatz: Ansatz, n_draws: int) -> tuple[str, ...]:
    """Return the row of one circuit, under the words of `HEADER`."""
    circuit, random = Circuit(ansatz), torch.Generator().manual_seed(ansatz.n_qubits)

    def feature(probabilities: Tensor) -> Tensor:
        return torch.sqrt(probabilities * circuit.n_states + FEATURE_EPSILON)

    places = (_start_angles(ansatz, n_draws, random), uniform_angles(ansatz, n_draws, random))
    start, drawn = (gradients_at(circuit, angles, feature, random) for angles in places)
    near_start, near_drawn = (expressivity_at(circuit, angles[:1], feature) for angles in places)
    return (
        *(ansatz.kind, str(ansatz.n_qubits), str(ansatz.n_angles)),
        *(f"{found.mean_feature:.3f}" for found in (start, drawn)),
        *(f"{found.mean_probability:.1e}" for found in (start, drawn)),
        f"{4**ansatz.n_qubits * drawn.mean_probability:.2f}",
        *(f"{found.rank:g}" for found in (near_start, near_drawn)),
        f"{near_drawn.spread:.3f}",
    )


def _start_angles(ansatz: Ansatz, n_draws: int, random: torch.Generator) -> Tensor:
    """Return float32[n_draws, n_angles], radians: the uniform state, with noise of its own in each draw."""
    uniform = kind_of(ansatz).window_angles(ansatz, torch.zeros(n_draws, 0))
    return uniform + WINDOW_NOISE * torch.randn(uniform.shape, generator=random)


if __name__ == "__main__":
    main()
