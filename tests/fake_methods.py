"""Methods that a bench can be tested with: an adapter nobody looks at, one that lies, one that explodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from qpa.bench.method import Attached, BenchBase, Configuration


@dataclass(frozen=True)
class UnusedAdapter:
    """Train numbers that the model never reads.

    Args:    n_trained: how many; n_declared: how many it says there are.
             attached: every (rate, seed) it was attached with.
    """

    name: str = "unused"
    rates: tuple[float, float, float] = (1e-3, 1e-2, 1e-1)
    n_trained: int = 10
    n_declared: int = 10
    attached: list[tuple[float, int]] = field(default_factory=list, compare=False)

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        return [Configuration("its size", (), self.n_declared)]

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        self.attached.append((rate, seed))
        numbers = torch.nn.Parameter(torch.zeros(self.n_trained))
        optimizer = torch.optim.AdamW([numbers], lr=rate, weight_decay=0.0)

        def save(directory: Path) -> None:
            save_file({"numbers": numbers.detach()}, directory / "adapter.safetensors")

        return Attached(base.load(), optimizer, save, exports_to_lora=True)


@dataclass(frozen=True)
class TrainedHead:
    """Train the output head; at an infinite rate it diverges."""

    name: str = "head"
    rates: tuple[float, float, float] = (1e-4, 1e-3, math.inf)

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        return [Configuration("its size", (), budgets[0])]

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        model = base.load()
        weight = model.get_output_embeddings().weight.requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
        return Attached(model, optimizer, lambda directory: None, exports_to_lora=False)
