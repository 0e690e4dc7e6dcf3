"""A part of a parameter that is trained as a tensor of its own.

PEFT keeps some adapters in parameters that hold several tensors: one holds the prefixes of all layers, and
another the LoRA of all experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter


class ParameterView:
    """A part of a parameter, with all that `GeneratedAdapterOptimizer` uses of a parameter.

    Args:    parameter: the whole parameter, a leaf of autograd.
             part: a function that returns a view, and never a copy, of a tensor of the parameter's shape.
    Source:  ours.
    """

    def __init__(self, parameter: Parameter, part: Callable[[Tensor], Tensor]) -> None:
        self.parameter = parameter
        self._part = part
        self._numbers = part(parameter.detach())

    def detach(self) -> Tensor:
        """Return the part's numbers; writing to them writes to the parameter."""
        if self._numbers.untyped_storage().data_ptr() != self.parameter.untyped_storage().data_ptr():
            self._numbers = self._part(self.parameter.detach())  # it was moved to another device
        return self._numbers

    @property
    def grad(self) -> Tensor | None:
        """Return the part's gradient, None where the parameter has none."""
        return None if self.parameter.grad is None else self._part(self.parameter.grad)

    @property
    def shape(self) -> torch.Size:
        """Return the part's shape."""
        return self.detach().shape

    @property
    def dtype(self) -> torch.dtype:
        """Return the parameter's type."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Return the parameter's device."""
        return self.parameter.device


AdapterParameter = Parameter | ParameterView


def leaf_of(parameter: AdapterParameter) -> Parameter:
    """Return the whole parameter, of which other tensors may be parts too."""
    return parameter.parameter if isinstance(parameter, ParameterView) else parameter
