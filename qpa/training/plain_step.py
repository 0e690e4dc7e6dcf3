"""A step of a loop without a trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from qpa.errors import DivergedError

MAX_NORM = 1.0
"""What the gradient is clipped to, over all trained parameters; the default of transformers' trainer too."""


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Pull a loss back, clip its gradient, take one step and forget the gradient.

    Args:    loss: of no dimension; one that depends on nothing that is trained has no gradient.
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
