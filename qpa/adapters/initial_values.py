"""The values of an adapter's tensors before training, where they are not read from the base model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpa.documents import TensorShape
from qpa.seeds import split_seed


def initial_value(tensor: TensorShape, rule: str, seed: int) -> Tensor:
    """Return an adapter tensor's value before training, float32, on the CPU.

    Args:    rule: "zeros"; "ones"; "kaiming_uniform": uniform in +-1/sqrt(in_features), as PEFT draws
             lora_A; "uniform" in +-1, which gives an embedding, whose inputs have a single one, the same.
             seed: of the run; the tensor's path is mixed in, so tensors do not depend on their order.
    """
    if rule in ("zeros", "ones"):
        return torch.full(tensor.shape, float(rule == "ones"))
    random = torch.Generator().manual_seed(split_seed(seed, tensor.path))
    bound = 1 / math.sqrt(tensor.shape[1]) if rule == "kaiming_uniform" else 1.0
    return torch.empty(tensor.shape).uniform_(-bound, bound, generator=random)
