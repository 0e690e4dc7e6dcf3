"""What qpa uses of torch beyond its documented interface, as seen in torch 2.13.

Each of these is one call for a list of tensors, on a GPU one kernel, where a loop would be one for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_each(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy every value into the target at its place."""
    torch._foreach_copy_(list(targets), list(values))


def add_each(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Add every value to the target at its place."""
    torch._foreach_add_(list(targets), list(values))


def norm_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of every tensor."""
    return list(torch._foreach_norm(list(tensors)))
