"""Forward and backward through a circuit of every ansatz kind, beside ry-cnot-chain.

Measured: seconds for B circuits, from float32 angles to probabilities and from a fixed cotangent back to the
angles' gradients, on one torch thread, CPU; and the same gate by gate, as a kind without a simulation of its
own has it. All kinds of a row take turns in one process (`benchmarks.paired`); the table has medians with
quartiles, and ratios are the medians of paired ratios to ry-cnot-chain.

    python -m benchmarks.ansatz_time [--shapes 7x8 11x5] [--circuits 1 16] [--rounds 15] [--budget-s 20]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.paired import markdown, spread, spread_of_ratios, time_in_turns
from qpa.circuits.ansatz import ANSATZE, AnsatzKind, make_ansatz
from qpa.documents import Ansatz

BASE = "ry-cnot-chain"

Probabilities = Callable[[Ansatz, Tensor], Tensor]


class Shape(NamedTuple):
    """Qubits and layers of a circuit."""

    n_qubits: int
    n_layers: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """Read "7x8"."""
        n_qubits, n_layers = text.split("x")
        return cls(int(n_qubits), int(n_layers))


def main() -> None:
    """Time everything in turns and print one table."""
    parser = argparse.ArgumentParser(description="Time the circuits of every ansatz kind.")
    parser.add_argument("--shapes", type=Shape.of, nargs="+", default=[Shape(7, 8), Shape(11, 5)])
    parser.add_argument("--circuits", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=20.0, help="Per shape, beyond three rounds.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for shape in options.shapes
        for n_circuits in options.circuits
        for row in _rows(shape, n_circuits, options.rounds, options.budget_s)
    ]
    print(f"torch {torch.__version__}\n")
    header = ("N", "L", "B", "ansatz", "angles", "ms", f"/ {BASE}", f"gate by gate / {BASE}")
    print(markdown(header, rows))


def _rows(shape: Shape, n_circuits: int, n_rounds: int, budget_s: float) -> list[tuple[str, ...]]:
    ansatze = {name: make_ansatz(name, shape.n_qubits, shape.n_layers) for name in ANSATZE}
    calls = {name: _call(ansatz, n_circuits, ANSATZE[name].probabilities) for name, ansatz in ansatze.items()}
    calls |= {
        _by_gates(name): _call(ansatz, n_circuits, _probabilities_by_gates)
        for name, ansatz in ansatze.items()
    }
    durations_s = time_in_turns(calls, n_rounds=n_rounds, budget_s=budget_s)
    return [
        (
            *(str(number) for number in (*shape, n_circuits)),
            name,
            str(ansatz.n_angles),
            spread([1e3 * value for value in durations_s[name]]).text(),
            spread_of_ratios(durations_s[name], durations_s[BASE]).text(),
            spread_of_ratios(durations_s[_by_gates(name)], durations_s[BASE]).text(),
        )
        for name, ansatz in ansatze.items()
    ]


def _by_gates(name: str) -> str:
    return f"{name}, gate by gate"


def _probabilities_by_gates(ansatz: Ansatz, angles: Tensor) -> Tensor:
    return AnsatzKind.probabilities(ANSATZE[ansatz.kind], ansatz, angles)


def _call(ansatz: Ansatz, n_circuits: int, probabilities: Probabilities) -> Callable[[], Tensor]:
    """Return a function that computes the gradient of <cotangent, p> by the angles."""
    random = torch.Generator().manual_seed(ansatz.n_qubits)
    angles = torch.empty(n_circuits, ansatz.n_angles).uniform_(-math.pi, math.pi, generator=random)
    cotangent = torch.randn(n_circuits, 2**ansatz.n_qubits, generator=random)
    leaf = angles.requires_grad_()

    def gradient() -> Tensor:
        (result,) = torch.autograd.grad(probabilities(ansatz, leaf), leaf, cotangent)
        return result

    return gradient


if __name__ == "__main__":
    main()
