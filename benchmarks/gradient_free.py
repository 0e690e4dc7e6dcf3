"""Training without gradients of the circuit, against training with them, by the executions that each needs.

    python -m benchmarks.gradient_free --model <stories260K> --data <tinyshakespeare input.txt>

All methods train the same generator `state` of 56 numbers, from the same start, on circuits that are sampled
with the same number of shots:

    adam, surrogate           qpa's default on sampled circuits: AdamW, gradients of the fitted simulation
    adam, parameter-shift     AdamW, gradients by the parameter shift rule
    adam, spsa                AdamW, gradients by simultaneous perturbation of the circuit alone
    momentum, parameter-shift gradient descent with momentum 0.9 in place of AdamW, as in Qiskit's AQGD
    spsa                      SPSA of the whole loss, gains as by Spall (1998): two losses a step
    cobyla                    SciPy's COBYLA of the loss on one batch that does not change

A loss takes the circuit once. The table has the validation loss after all steps, the executions until then,
and the executions after which the loss was first within WITHIN nats of what AdamW reaches on exact circuits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from scipy.optimize import minimize
from torch import Tensor

from qpa.bench.generated import state_method
from qpa.bench.method import Attached, Configuration
from qpa.bench.report import markdown_table
from qpa.bench.setting import Setting
from qpa.bench.task import Task, load_task
from qpa.bench.trial import batches, learning_rate_scale
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.estimator import GRADIENTS
from qpa.circuits.sources.source import SOURCES, SourceSettings
from qpa.training.evaluation import causal_loss
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.plain_step import take_step

N_LAYERS, RATE = 5, 0.05
WITHIN = 0.05
N_VALIDATION = 64
SGD_RATE, MOMENTUM = 0.1, 0.9
SPSA_GAIN, SPSA_STEP = 0.1, 0.1
"""Of the rates 0.03 to 8 and the gains 0.03 to 1 the best with seed 0."""

Curve = list[tuple[int, float]]
"""Executions so far, and the validation loss."""


class Trained:
    """One generator on its way: what is trained, what was spent, and the loss on the way."""

    def __init__(self, task: Task, source: str, gradient: str, shots: int | None, seed: int) -> None:
        self.task, self.shots = task, shots or 1
        configuration = Configuration("layers 5", (("layers", N_LAYERS),), 56)
        method = state_method("circuit")
        self.attached: Attached = method.attach(task.base, configuration, rate=RATE, seed=seed)
        self.optimizer = cast(GeneratedAdapterOptimizer, self.attached.optimizer)
        self.generator = cast(Any, self.optimizer.generator)
        features: Any = self.generator.chunk_features
        settings = SourceSettings(seed, shots)
        features.execution = Execution(
            features.execution.circuit, SOURCES[source](settings), GRADIENTS[gradient](seed)
        )
        self.numbers = [p for p in self.generator.parameters() if p.requires_grad]
        self.n_executions = 0
        self.curve: Curve = []

    def batches(self, n_steps: int, seed: int) -> Iterator[Tensor]:
        """Return the batches of the training rows, the same for every method."""
        return batches(self.task.base.train_rows, 8, n_steps, seed)

    def note(self) -> None:
        """Write down the validation loss."""
        self.curve.append((self.n_executions, self.loss_on(self.task.validation[:N_VALIDATION])))

    def loss_on(self, rows: Tensor) -> float:
        """Return the loss of the model as it is."""
        with torch.no_grad():
            return float(causal_loss(self.attached.model, rows, rows, bf16=False))

    def move_to(self, numbers: Tensor) -> None:
        """Set what is trained, run the circuit once, and give the model the adapter."""
        with torch.no_grad():
            parts = torch.split(numbers, [p.numel() for p in self.numbers])
            for parameter, part in zip(self.numbers, parts, strict=True):
                parameter.copy_(part.view_as(parameter))
            measured = self.generator.run()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "measured": measured})
        self.n_executions += self.shots

    def at(self) -> Tensor:
        """Return what is trained, float32[n_numbers]."""
        return torch.cat([p.detach().flatten() for p in self.numbers])


def with_adam(trained: Trained, n_steps: int, seed: int, rate: float = RATE) -> None:
    """Take steps of the inner optimizer, which is AdamW, with the rate's usual schedule."""
    features: Any = trained.generator.chunk_features
    cost = features.execution.step_cost(1).n_executions
    for step, rows in enumerate(trained.batches(n_steps, seed)):
        for group in trained.optimizer.param_groups:
            group["lr"] = rate * learning_rate_scale(step, n_steps)
        take_step(trained.optimizer, causal_loss(trained.attached.model, rows, rows, bf16=False))
        trained.n_executions += cost
        trained.note()


def with_momentum(trained: Trained, n_steps: int, seed: int) -> None:
    """Take steps of gradient descent with momentum in place of AdamW's."""
    groups = [{"params": group["params"]} for group in trained.optimizer.inner.param_groups]
    trained.optimizer.inner = cast(Any, torch.optim.SGD(groups, lr=SGD_RATE, momentum=MOMENTUM))
    with_adam(trained, n_steps, seed, SGD_RATE)


def with_spsa(trained: Trained, n_steps: int, seed: int) -> None:
    """Take steps of SPSA of the whole loss, with gains that fall as by Spall."""
    random = torch.Generator().manual_seed(seed)
    here = trained.at()
    for step, rows in enumerate(trained.batches(n_steps, seed)):
        gain, width = SPSA_GAIN / (step + 1 + 0.1 * n_steps) ** 0.602, SPSA_STEP / (step + 1) ** 0.101
        signs = 2.0 * torch.randint(2, here.shape, generator=random) - 1
        losses = []
        for sign in (1, -1):
            trained.move_to(here + sign * width * signs)
            losses.append(trained.loss_on(rows))
        here = here - gain * (losses[0] - losses[1]) / (2 * width) * signs
        trained.move_to(here)
        trained.note()


def with_cobyla(trained: Trained, n_steps: int, seed: int) -> None:
    """Minimise the loss of one batch, with as many losses as SPSA takes."""
    rows = torch.cat(list(trained.batches(2, seed)))
    evaluated = 0

    def loss(numbers: Any) -> float:
        nonlocal evaluated
        trained.move_to(torch.as_tensor(numbers, dtype=torch.float32))
        evaluated += 1
        if evaluated % 3 == 0:
            trained.note()
        return trained.loss_on(rows)

    found = minimize(
        loss, trained.at().numpy(), method="COBYLA", options={"maxiter": 3 * n_steps, "rhobeg": 0.3}
    )
    trained.move_to(torch.as_tensor(found.x, dtype=torch.float32))
    trained.note()


Way = Callable[[Trained, int, int], None]
METHODS: dict[str, tuple[str, Way, float]] = {
    "adam, surrogate": ("surrogate", with_adam, 1),
    "adam, parameter-shift": ("parameter-shift", with_adam, 1),
    "adam, spsa": ("spsa", with_adam, 2),
    "momentum, parameter-shift": ("parameter-shift", with_momentum, 1),
    "spsa": ("surrogate", with_spsa, 4),
    "cobyla": ("surrogate", with_cobyla, 4),
}
"""By name: the estimator of gradients, how steps are taken, and how many times as many of them."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Train with and without gradients of the circuit.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shots", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(Setting(model=options.model, data=options.data))
    exact = []
    for seed in range(options.seeds):
        trained = Trained(task, "exact", "adjoint", None, seed)
        with_adam(trained, options.steps, seed)
        exact.append(trained.curve[-1][1])
    goal = statistics.mean(exact) + WITHIN
    rows: list[tuple[str, ...]] = [
        ("method", "steps", "last loss", "executions", f"executions to {goal:.3f}"),
        ("adam, exact", str(options.steps), _spread(exact), "-", "-"),
    ]
    for name, (gradient, way, factor) in METHODS.items():
        curves: list[Curve] = []
        n_steps = int(factor * options.steps)
        for seed in range(options.seeds):
            trained = Trained(task, "shots", gradient, options.shots, seed)
            way(trained, n_steps, seed)
            curves.append(trained.curve)
        reached = [next((spent for spent, loss in curve if loss <= goal), None) for curve in curves]
        known = [spent for spent in reached if spent is not None]
        found = f"{statistics.median(known):,.0f}" if len(known) == len(reached) else f"{len(known)} reach it"
        last = [curve[-1][1] for curve in curves]
        rows.append((name, str(n_steps), _spread(last), f"{curves[0][-1][0]:,}", found))
        print(rows[-1], flush=True)
    print(markdown_table(rows))


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


if __name__ == "__main__":
    main()
