"""A step of a loop without a trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from qpa.errors import DivergedError

MAX_NORM = 1.0
"""The norm to which the gradient of all trained parameters is clipped, as transformers' trainer does."""


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Pull a loss back, clip its gradient, take one step and forget the gradient.

    Args:    loss: a scalar; where it depends on nothing that is trained, it has no gradient.
    Raises:  DivergedError: loss or gradient is not finite; nothing has moved.
    """
    if loss.requires_grad:
        torch.autograd.backward(loss)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        raise DivergedError("training", "a finite loss and gradient", "NaN or infinity", "lower the rate")
    optimizer.step()
    optimizer.zero_grad()
