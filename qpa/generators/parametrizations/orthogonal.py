"""orthogonal-rows and scaled-orthogonal-columns: vectors that are columns of orthogonal circuits.

Rules:
1. The K vectors of N numbers of a tensor, its rows or its columns, are the first K columns of an orthogonal
   matrix of side N that RY and CZ gates make (`qpa.circuits.two_design`). Angles are drawn in [-pi, pi).
2. Where they are scaled, each has a factor. The factors start at zero, and so does the tensor.
3. The numbers are real amplitudes of a circuit and not probabilities: they have signs, and no device
   measures them.

Source: Pauli parameterization of Quantum-PEFT, arXiv 2503.05431; the distribution of the angles is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qpa.circuits.two_design import (
    orthogonal_columns,
    two_design_angles,
    two_design_circuits,
    two_design_qubits,
)
from qpa.documents.tensors import Shape
from qpa.generators.parametrizations.kind import Parametrization, Sizes


class OrthogonalVectors(nn.Module):
    """The orthonormal vectors of several tensors of one shape, which come of angles.

    Args:    n_vectors, side: of each tensor.
             seeds: of the angles of each tensor.
    """

    def __init__(self, n_vectors: int, side: int, n_layers: int, seeds: Sequence[int]) -> None:
        super().__init__()
        self.n_vectors, self.side, self.n_layers = n_vectors, side, n_layers
        shape = (two_design_circuits(side), two_design_angles(two_design_qubits(side), n_layers))
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.angles = Parameter((2 * torch.stack(drawn) - 1) * math.pi)

    def columns(self) -> Tensor:
        """Return float32[n_tensors, side, n_vectors]."""
        return orthogonal_columns(self.angles, self.side, self.n_vectors, self.n_layers)

    def forward(self) -> Tensor:
        """Return the vectors as rows, float32[n_tensors, n_vectors, side]."""
        return self.columns().mT


class ScaledOrthogonalVectors(OrthogonalVectors):
    """The same vectors, each times a factor that starts at zero."""

    def __init__(self, n_vectors: int, side: int, n_layers: int, seeds: Sequence[int]) -> None:
        super().__init__(n_vectors, side, n_layers, seeds)
        self.factors = Parameter(torch.zeros(len(seeds), n_vectors))

    def forward(self) -> Tensor:
        """Return the vectors as columns, float32[n_tensors, side, n_vectors]."""
        return self.columns() * self.factors[:, None]


@final
class OrthogonalRows(Parametrization):
    """Orthonormal rows; their one size is "layers"."""

    name: ClassVar[str] = "orthogonal-rows"
    replaces_initial: ClassVar[bool] = True

    def n_parameters(self, shape: Shape, sizes: Sizes) -> tuple[int, int]:
        """Return the angles of the rows' circuits."""
        return _n_angles(shape[1], sizes), 0

    def build(self, shape: Shape, sizes: Sizes, seeds: Sequence[int]) -> OrthogonalVectors:
        """Return vectors at random angles."""
        return OrthogonalVectors(shape[0], shape[1], sizes["layers"], seeds)


@final
class ScaledOrthogonalColumns(Parametrization):
    """Orthonormal columns, each times a factor; their one size is "layers"."""

    name: ClassVar[str] = "scaled-orthogonal-columns"
    replaces_initial: ClassVar[bool] = True

    def n_parameters(self, shape: Shape, sizes: Sizes) -> tuple[int, int]:
        """Return the angles of the columns' circuits, and a factor for each column."""
        return _n_angles(shape[0], sizes), shape[1]

    def build(self, shape: Shape, sizes: Sizes, seeds: Sequence[int]) -> ScaledOrthogonalVectors:
        """Return vectors at random angles, with factors of zero."""
        return ScaledOrthogonalVectors(shape[1], shape[0], sizes["layers"], seeds)


def _n_angles(side: int, sizes: Sizes) -> int:
    return two_design_circuits(side) * two_design_angles(two_design_qubits(side), sizes["layers"])


ORTHOGONAL_ROWS = OrthogonalRows()
SCALED_ORTHOGONAL_COLUMNS = ScaledOrthogonalColumns()
