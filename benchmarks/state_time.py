"""The circuit of the generator of one state, forward and back, beside a model's forward and backward pass.

Measured: seconds for one circuit of the default ansatz with 12 layers, from angles to features and back to
the angles' gradients, on one torch thread, CPU; and for the forward and backward pass of a model on 8 x 128
tokens, which every training step takes. They take turns in one process (`benchmarks.paired`); the table has
medians with quartiles, and ratios are the medians of paired ratios. 11 qubits are those of stories260K, 15
those of a Llama of 70 billion parameters, 18 those of a model with hundreds of experts.

    python -m benchmarks.state_time --model <stories260K> [--qubits 11 15 18] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.paired import markdown, spread, spread_of_ratios, time_in_turns
from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.generators.state import N_LAYERS
from qpa.training.evaluation import causal_loss

MODEL = "model"


def main() -> None:
    """Time everything in turns and print one table."""
    parser = argparse.ArgumentParser(description="Time the circuit of one state beside a model's passes.")
    parser.add_argument("--model", required=True, help="Directory of a causal language model.")
    parser.add_argument("--qubits", type=int, nargs="+", default=[11, 15, 18])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    torch.set_num_threads(1)
    calls: dict[str, Callable[[], object]] = {MODEL: _passes_of(options.model)}
    calls |= {str(n_qubits): _passes_through(n_qubits) for n_qubits in options.qubits}
    durations_s = time_in_turns(calls, n_rounds=options.rounds)
    in_ms = {name: spread([1e3 * value for value in values]).text() for name, values in durations_s.items()}
    rows = [
        (
            name,
            str(1 + int(name) * N_LAYERS),
            in_ms[name],
            spread_of_ratios(values, durations_s[MODEL]).text(),
        )
        for name, values in durations_s.items()
        if name != MODEL
    ]
    print(f"torch {torch.__version__}; the model's passes: {in_ms[MODEL]} ms\n")
    print(markdown(("qubits", "trained", "circuit, ms", "circuit / model"), rows))


def _passes_of(model_path: str) -> Callable[[], object]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.randint(model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    return lambda: torch.autograd.backward(causal_loss(model, ids, ids, bf16=False))


def _passes_through(n_qubits: int) -> Callable[[], object]:
    circuit = Circuit(make_ansatz("ry-cnot-chain", n_qubits, N_LAYERS))
    random = torch.Generator().manual_seed(n_qubits)
    angles = torch.randn(1, circuit.n_angles, generator=random).requires_grad_()

    def call() -> None:
        features = torch.sqrt(circuit.exact_probabilities(angles) * circuit.n_states + 0.01)
        torch.autograd.backward(features.sum())

    return call


if __name__ == "__main__":
    main()
