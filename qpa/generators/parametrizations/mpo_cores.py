"""The cores of several matrix product operators of one form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qpa.adapters.matrix_product import MatrixProduct


class Cores(nn.Module):
    """Trained cores, which start as `qpa.generators.parametrizations.mpo` says.

    Args:    seeds: one for each matrix, of its cores.
             starts_at_zero: whether the matrices start at zero.
    """

    def __init__(self, form: MatrixProduct, seeds: Sequence[int], *, starts_at_zero: bool) -> None:
        super().__init__()
        self.form = form
        variance = 1.0 if starts_at_zero else 1 / (3 * form.shape[1])
        bound = math.sqrt(3) * (variance / math.prod(form.bonds)) ** (0.5 / len(form.shapes))
        drawn = [_uniform(form, bound, seed) for seed in seeds]
        cores = [torch.stack(same) for same in zip(*drawn, strict=True)]
        if starts_at_zero:
            cores[-1].zero_()
        self.cores = nn.ParameterList(Parameter(core) for core in cores)

    def forward(self) -> Tensor:
        """Return the matrices, float32[n_matrices, n_rows, n_columns]."""
        return self.form.matrix(list(self.cores))


def _uniform(form: MatrixProduct, bound: float, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.empty(shape).uniform_(-bound, bound, generator=random) for shape in form.shapes]
