"""The value of an adapter's tensor before training, by the rule of its role."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpa.seeds import split_seed


def initial_value(path: str, shape: tuple[int, int], rule: str, seed: int) -> Tensor:
    """Return a tensor's value before training, float32, on the CPU.

    Args:    path: the tensor's path, which is mixed into the seed, so that values do not depend on the order.
             rule: "zeros"; "ones"; "kaiming_uniform", which is uniform in +-1/sqrt(in_features), as PEFT
             draws lora_A; or "uniform", which is uniform in +-1 and gives an embedding, whose input has a
             single 1, outputs of the same size.
             seed: the seed of the run.
    """
    if rule in ("zeros", "ones"):
        return torch.full(shape, float(rule == "ones"))
    random = torch.Generator().manual_seed(split_seed(seed, path))
    bound = 1 / math.sqrt(shape[1]) if rule == "kaiming_uniform" else 1.0
    return torch.empty(shape).uniform_(-bound, bound, generator=random)
