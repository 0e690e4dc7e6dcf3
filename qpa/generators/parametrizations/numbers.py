"""numbers: a tensor's own numbers, as they are trained where there is no generator.

Rules:
1. Every number of the tensor is trained by itself. All start at zero, so that the tensor starts at its
   initial value.

Source:  ours; it is what LoRA and every other kind of adapter does, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qpa.documents.tensors import Shape
from qpa.generators.parametrizations.kind import Parametrization, Sizes


class OwnNumbers(nn.Module):
    """The numbers of several tensors of one shape, which start at zero."""

    def __init__(self, n_tensors: int, shape: Shape) -> None:
        super().__init__()
        self.numbers = Parameter(torch.zeros(n_tensors, *shape))

    def forward(self) -> Tensor:
        """Return the parameter itself, float32[n_tensors, *shape]."""
        return self.numbers


@final
class NumbersKind(Parametrization):
    """A tensor's own numbers."""

    name: ClassVar[str] = "numbers"

    def n_parameters(self, shape: Shape, sizes: Sizes) -> tuple[int, int]:
        """Return that no angle and every number of the tensor is trained."""
        return 0, shape[0] * shape[1]

    def build(self, shape: Shape, sizes: Sizes, seeds: Sequence[int]) -> OwnNumbers:
        """Return zeros; nothing is drawn."""
        return OwnNumbers(len(seeds), shape)


NUMBERS = NumbersKind()
