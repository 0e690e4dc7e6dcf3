"""Forward and backward through the circuit: `qpa.circuits.sources.exact.ExactSimulator` against its peers.

Measured: seconds for B independent circuits of N qubits and 8 layers, from angles to probabilities and from
a fixed cotangent back to the angles' gradients, on one torch thread, CPU. Peers:

* PennyLane's default.qubit, torch interface. Methods tried: "backprop", all circuits at once by parameter
  broadcasting; "backprop" in a loop over the circuits; "adjoint" in a loop, on the state, squared in torch,
  for PennyLane has no adjoint of probabilities. The fastest of them is PennyLane's time in that row.
  "parameter-shift" runs 2*N*8 further circuits for one gradient and is not timed. Angles are float32;
  PennyLane computes in the precision it chooses, and the table names that of its probabilities.
* Naive torch: gate by gate on a real float32 state, autograd through every gate, all circuits at once.

Before anything is timed, every contender's probabilities and gradients are checked against ours: to 1e-4 of
the largest number. A method that fails is named with its reason. Contenders take turns in one process
(`benchmarks.paired`); the table has medians with quartiles, and ratios are the medians of paired ratios.
A loop over B circuits is timed on at most 8 of them and multiplied.

Target: at least 30 times as fast as PennyLane.

    pip install 'qpa[bench]'
    python -m benchmarks.circuit_time [--qubits 4 7 11] [--circuits 1 24 196] [--budget-s 20]
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.paired import markdown, spread, spread_of_ratios, time_in_turns
from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.exact import ExactSimulator
from qpa.errors import one_sentence

N_LAYERS = 8
N_LOOPED = 8
OURS, NAIVE = "qpa", "naive torch"
TOLERANCE = 1e-4

Probabilities = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    """A way to evaluate circuits.

    Args:    probabilities: [n_circuits, 8, n_qubits] angles -> [n_circuits, 2**n_qubits], differentiable.
             most_circuits: how many it is timed on; the time is scaled up to the number asked for.
    """

    probabilities: Probabilities
    most_circuits: float = math.inf


def main() -> None:
    """Check, time and print one table."""
    parser = argparse.ArgumentParser(description="Time the circuit against PennyLane and naive torch.")
    parser.add_argument("--qubits", type=int, nargs="+", default=[4, 7, 11])
    parser.add_argument("--circuits", type=int, nargs="+", default=[1, 24, 196])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=20.0, help="Per row, beyond three rounds.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import pennylane

    print(f"PennyLane {pennylane.__version__}, torch {torch.__version__}\n")
    header = (
        "N",
        "B",
        "qpa, ms",
        "PennyLane's best, ms",
        "PennyLane / qpa",
        "naive torch / qpa",
        "PennyLane's",
    )
    rows = [
        _row(n_qubits, n_circuits, options.rounds, options.budget_s)
        for n_qubits in options.qubits
        for n_circuits in options.circuits
    ]
    print(markdown(header, rows))


def _row(n_qubits: int, n_circuits: int, n_rounds: int, budget_s: float) -> tuple[str, ...]:
    random = torch.Generator().manual_seed(n_qubits)
    angles = torch.empty(n_circuits, N_LAYERS, n_qubits).uniform_(-math.pi, math.pi, generator=random)
    cotangent = torch.randn(n_circuits, 2**n_qubits, generator=random)
    contenders = {OURS: Contender(simulate), NAIVE: Contender(naive_probabilities)}
    contenders |= pennylane_contenders(n_qubits, n_circuits)
    notes = {name: _disagreement(contender, angles, cotangent) for name, contender in contenders.items()}
    usable = {name: contender for name, contender in contenders.items() if not notes[name]}
    calls = {name: _call(contender, angles, cotangent) for name, contender in usable.items()}
    durations_s = time_in_turns(calls, n_rounds=n_rounds, budget_s=budget_s)
    for name, contender in usable.items():
        scale = n_circuits / min(n_circuits, contender.most_circuits)
        durations_s[name] = [scale * duration_s for duration_s in durations_s[name]]
    peers = {name: spread(values) for name, values in durations_s.items() if name not in (OURS, NAIVE)}
    best = min(peers, key=lambda name: peers[name].median)
    others = [f"{name} {1e3 * peers[name].median:.3g} ms" for name in peers if name != best]
    others += [f"{name}: {note}" for name, note in notes.items() if note]
    return (
        str(n_qubits),
        str(n_circuits),
        spread([1e3 * value for value in durations_s[OURS]]).text(),
        spread([1e3 * value for value in durations_s[best]]).text(),
        spread_of_ratios(durations_s[best], durations_s[OURS]).text(),
        spread_of_ratios(durations_s[NAIVE], durations_s[OURS]).text(),
        f"{best}; {', '.join(others)}",
    )


def _call(contender: Contender, angles: Tensor, cotangent: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes the gradient of <cotangent, p> by the angles."""
    n_timed = int(min(len(angles), contender.most_circuits))
    leaf = angles[:n_timed].clone().requires_grad_()
    weights = cotangent[:n_timed]

    def gradient() -> Tensor:
        probabilities = contender.probabilities(leaf)
        (result,) = torch.autograd.grad(probabilities, leaf, weights.to(probabilities.dtype))
        return result

    return gradient


def _disagreement(contender: Contender, angles: Tensor, cotangent: Tensor) -> str:
    """Return why a contender cannot be compared with ours, "" where it agrees."""
    few = slice(0, min(2, len(angles)))
    ours = Contender(simulate)
    try:
        found = contender.probabilities(angles[few]).detach(), _call(contender, angles[few], cotangent[few])()
    except Exception as error:  # whatever a peer raises for what it does not support
        return f"{type(error).__name__}, {one_sentence(error, limit=80)}"
    expected = ours.probabilities(angles[few]), _call(ours, angles[few], cotangent[few])()
    for name, a, b in zip(("probabilities", "gradients"), found, expected, strict=True):
        difference = float((a - b).abs().max() / b.abs().max())
        if not difference < TOLERANCE:
            return f"{name} differ by {difference:.1e}"
    return ""


def naive_probabilities(angles: Tensor) -> Tensor:
    """Simulate gate by gate, as one would write it first; same arguments and result as ours."""
    n_circuits, n_layers, n_qubits = angles.shape
    state = torch.zeros(n_circuits, 2**n_qubits)
    state[:, 0] = 1.0
    state = state.view(n_circuits, *(2,) * n_qubits)
    for layer in range(n_layers):
        for qubit in range(n_qubits):
            state = _ry(state, 0.5 * angles[:, layer, qubit], qubit + 1)
        for qubit in range(n_qubits - 1):
            state = _cnot(state, qubit + 1, qubit + 2)
    return state.flatten(1).square()


def _ry(state: Tensor, half_angle: Tensor, axis: int) -> Tensor:
    shape = (-1, *(1,) * (state.dim() - 2))
    cos, sin = half_angle.cos().view(shape), half_angle.sin().view(shape)
    zero, one = state.unbind(axis)
    return torch.stack((cos * zero - sin * one, sin * zero + cos * one), dim=axis)


def _cnot(state: Tensor, control_axis: int, target_axis: int) -> Tensor:
    zero, one = state.unbind(control_axis)
    return torch.stack((zero, one.flip(target_axis - 1)), dim=control_axis)


def simulate(angles: Tensor) -> Tensor:
    """Run the product's own simulator on angles [n_circuits, n_layers, n_qubits]."""
    circuit = Circuit(make_ansatz("ry-cnot-chain", angles.shape[2], angles.shape[1]))
    return ExactSimulator().probabilities(circuit, angles.flatten(1))


def pennylane_contenders(n_qubits: int, n_circuits: int) -> dict[str, Contender]:
    """Return PennyLane's ways; wire 0 is the most significant bit there as here."""
    backprop, adjoint = _qnode(n_qubits, "backprop"), _qnode(n_qubits, "adjoint")
    precision = str(backprop(torch.zeros(N_LAYERS, n_qubits)).dtype).removeprefix("torch.")

    def broadcast(angles: Tensor) -> Tensor:
        probabilities: Tensor = backprop(angles[0] if len(angles) == 1 else angles)
        return probabilities.view(len(angles), -1)

    def loop(angles: Tensor) -> Tensor:
        return torch.stack([backprop(circuit) for circuit in angles])

    def adjoint_loop(angles: Tensor) -> Tensor:
        return torch.stack([adjoint(circuit).abs().square() for circuit in angles])

    ways = {
        f"backprop ({precision})": Contender(broadcast),
        "adjoint loop": Contender(adjoint_loop, N_LOOPED),
    }
    return ways if n_circuits == 1 else ways | {"backprop loop": Contender(loop, N_LOOPED)}


def _qnode(n_qubits: int, method: str) -> Any:
    import pennylane

    device = pennylane.device("default.qubit", wires=n_qubits)
    options = {"device_vjp": True} if method == "adjoint" else {}

    def circuit(angles: Tensor) -> object:
        for layer in range(N_LAYERS):
            for qubit in range(n_qubits):
                pennylane.RY(angles[..., layer, qubit], wires=qubit)
            for qubit in range(n_qubits - 1):
                pennylane.CNOT(wires=(qubit, qubit + 1))
        return pennylane.state() if method == "adjoint" else pennylane.probs(wires=range(n_qubits))

    return pennylane.qnode(device, interface="torch", diff_method=method, **options)(circuit)


if __name__ == "__main__":
    main()
