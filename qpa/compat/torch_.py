"""What qpa uses of torch beyond its documented interface, as seen in torch 2.13.

An operation on each of several tensors is one call with the list of them, and one kernel on a GPU, where a
loop would need a kernel for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def allocations(profile: torch.profiler.profile) -> list[int]:
    """Return the bytes of every allocation, negative where they were freed, in the order of time."""
    profiler: Any = profile.profiler
    records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return [record.nbytes() for record in sorted(records, key=lambda event: event.start_ns())]


def promise(condition: object) -> None:
    """Tell the tracer of `torch.export` that a condition on lengths holds; outside a trace it is checked.

    Args:    condition: a bool, or a torch.SymBool while a model is traced.
    """
    torch._check(condition)  # type: ignore[no-untyped-call]
