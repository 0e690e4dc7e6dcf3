"""A small dense matrix between two fixed bases: delta W = U C V, with only C trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter

from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.bench.peft_methods import MAX_SERVED_RANK
from qpa.models.linear_layers import stores_transpose
from qpa.training.calibration import choose_rows
from qpa.training.evaluation import causal_loss

N_CALIBRATION_BATCHES = 16
CALIBRATION_BATCH_SIZE = 8
Basis = tuple[Tensor, Tensor]


class CoreLinear(Module):
    """A frozen linear layer plus U C V.

    Args:    base: a linear layer that maps n_in to n_out features.
             left: float32[n_out, r], U; right: float32[r, n_in], V.
    """

    left: Tensor
    right: Tensor

    def __init__(self, base: Module, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.core = Parameter(torch.zeros(left.shape[1], right.shape[0], device=left.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + U C V x; float[..., n_in] to float[..., n_out]."""
        linear = torch.nn.functional.linear
        delta = linear(linear(linear(x, self.right), self.core), self.left)
        output: Tensor = self.base(x) + delta
        return output


@dataclass(frozen=True)
class FixedBasis:
    """delta W = U C V, where U and V hold the first r singular vectors of the weight or of its gradient.

    Rules:
    1. "weight": V is scaled by the singular values of W, as in LoRA-XS.
    2. "gradient": U and V are those of dL/dW, summed over 16 batches of 8 training rows at the base model,
       as in LoRA-SB.
    3. C starts at zero in both, where the papers start near zero and at the first step of full training.

    Source:  LoRA-XS, arXiv 2405.17604; LoRA-SB, arXiv 2411.19557; the code is ours.
    """

    name: str
    source: Literal["weight", "gradient"]
    rates: tuple[float, float, float] = (3e-3, 1e-2, 3e-2)

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return the ranks around each budget."""
        sides = _smaller_sides(base)
        ideal = [math.isqrt(max(1, budget // len(sides))) for budget in budgets]
        ranks = sorted({rank for low in ideal for rank in (low, low + 1) if 1 <= rank <= max(sides)})
        return [
            Configuration(f"r={rank}", (("r", rank),), sum(min(rank, side) ** 2 for side in sides))
            for rank in ranks
        ]

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Replace each target module by a `CoreLinear` around it.

        Args:    rate: peak learning rate of AdamW.
                 seed: chooses the calibration rows.
        """
        rank = int(dict(configuration.knobs)["r"])
        model = base.load()
        bases = (
            _gradient_bases(base, rank, seed)
            if self.source == "gradient"
            else _weight_bases(base, model, rank)
        )
        cores = {path: _wrap(model, path, *bases[path]) for path in base.target_modules}
        optimizer = torch.optim.AdamW([core.core for core in cores.values()], lr=rate, weight_decay=0.0)
        save = _saver(cores, with_bases=self.source == "gradient")
        return Attached(model, optimizer, save, exports_to_lora=rank <= MAX_SERVED_RANK)


def _smaller_sides(base: BenchBase) -> list[int]:
    return [min(a.shape[1], b.shape[0]) for a, b in base.inspect(1).pairs]


def weight_of(module: Any) -> Tensor:
    """Return a linear layer's weight as float32[n_out, n_in]."""
    weight: Tensor = module.weight.detach().float()
    return weight.T if stores_transpose(module) else weight


def _weight_bases(base: BenchBase, model: Any, rank: int) -> dict[str, Basis]:
    bases: dict[str, Basis] = {}
    for path in base.target_modules:
        left, values, right = torch.linalg.svd(weight_of(model.get_submodule(path)), full_matrices=False)
        scaled = values[:rank, None] * right[:rank]
        bases[path] = (left[:, :rank].contiguous(), scaled.contiguous())
    return bases


def _gradient_bases(base: BenchBase, rank: int, seed: int) -> dict[str, Basis]:
    bases: dict[str, Basis] = {}
    for path, gradient in _gradients(base, seed).items():
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        bases[path] = (left[:, :rank].contiguous(), right[:rank].contiguous())
    return bases


def _gradients(base: BenchBase, seed: int) -> dict[str, Tensor]:
    """Return dL/dW of the target modules at the base model, float32[n_out, n_in], by path."""
    model = base.load()
    modules = {path: model.get_submodule(path) for path in base.target_modules}
    for module in modules.values():
        module.weight = Parameter(module.weight.detach().float())
    chosen = choose_rows(len(base.train_rows), CALIBRATION_BATCH_SIZE, seed, N_CALIBRATION_BATCHES)
    for numbers in chosen:
        batch = base.train_rows[numbers].to(model.device)
        torch.autograd.backward(causal_loss(model, batch, batch, bf16=base.bf16))
    gradients = {path: module.weight.grad for path, module in modules.items()}
    return {path: g.T if stores_transpose(modules[path]) else g for path, g in gradients.items()}


def _wrap(model: Any, path: str, left: Tensor, right: Tensor) -> CoreLinear:
    parent, _, name = path.rpartition(".")
    core = CoreLinear(model.get_submodule(path), left, right)
    setattr(model.get_submodule(parent), name, core)
    return core


def _saver(cores: dict[str, CoreLinear], *, with_bases: bool) -> Callable[[Path], None]:
    """Return a function that writes C, and U and V where the base model alone does not give them again."""

    def save(directory: Path) -> None:
        tensors = {f"{path}.core": core.core.detach() for path, core in cores.items()}
        if with_bases:
            for path, core in cores.items():
                tensors |= {f"{path}.left": core.left, f"{path}.right": core.right}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter.safetensors"
        )

    return save


FIXED_BASIS = {
    method.name: method for method in (FixedBasis("lora-xs", "weight"), FixedBasis("lora-sb", "gradient"))
}
