"""A part of a parameter that is trained as a tensor of its own.

PEFT keeps some adapters in larger parameters than the tensors that belong together: the prefixes of all
layers in one, the LoRA of all experts in one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter


class ParameterView:
    """What `GeneratedAdapterOptimizer` uses of a parameter, of a part of one.

    Args:    parameter: a leaf.
             part: gives a view of a tensor of the parameter's shape, never a copy.
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
    """Return the parameter itself, of which others may be parts too."""
    return parameter.parameter if isinstance(parameter, ParameterView) else parameter
