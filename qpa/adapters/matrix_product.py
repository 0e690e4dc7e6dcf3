"""Matrix product operators: a matrix as a chain of small arrays, of which each meets a factor of both sides.

    M[(o_0 .. o_n), (i_0 .. i_n)] = core_0[o_0, i_0] core_1[o_1, i_1] .. core_n[o_n, i_n]

where core_k[o, i] is itself a small matrix [b_k, b_k+1], and b_0 and the last b are 1. The b between are the
bond dimensions: at 1 the matrix is a Kronecker product, and at the largest ones it is any matrix.

Rules:
1. Both sides are divided into N_SITES factors, whose product is the side exactly: nothing is padded. The
   prime factors, largest first, are each multiplied into what is the smallest so far. A side with fewer
   prime factors has factors of 1.
2. The factors of the rows descend and those of the columns ascend, so that no site gets the largest of both.
3. A bond is never larger than what is on its left, or on its right, can fill.
4. A core is stored as the matrix [b_k o_k, i_k b_k+1].

Source: tensor-train matrices, arXiv 1509.06569; the rules are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpa.pipeline.options import option

if TYPE_CHECKING:
    from torch import Tensor

N_SITES = 3

BOND_DIMENSION = 4
"""Where none is asked for; no paper gives one."""

Shape = tuple[int, int]


def bond_dimension_option() -> Any:
    """Declare the field `bond_dimension` of a pass."""
    return option(
        None,
        help="Most numbers that one site of a matrix product operator tells the next.",
        at_least=1,
        shown_default=str(BOND_DIMENSION),
    )


@dataclass(frozen=True)
class MatrixProduct:
    """The form of a matrix product operator.

    Args:    rows, columns: a factor of each side by site; the first is the most significant.
             bonds: the dimensions between the sites, one fewer than there are sites.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    bonds: tuple[int, ...]

    @classmethod
    def of(cls, n_rows: int, n_columns: int, bond_dimension: int) -> MatrixProduct:
        """Return the form for a matrix, with bonds of at most a dimension."""
        rows, columns = row_factors(n_rows), column_factors(n_columns)
        sizes = [row * column for row, column in zip(rows, columns, strict=True)]
        bonds = [
            min(bond_dimension, math.prod(sizes[:site]), math.prod(sizes[site:]))
            for site in range(1, len(sizes))
        ]
        return cls(rows, columns, tuple(bonds))

    @classmethod
    def of_rows(cls, n_rows: int, shapes: Sequence[Shape]) -> MatrixProduct:
        """Return the form of stored cores of a matrix of so many rows.

        Raises:  ValueError: there is none.
        """
        rows = row_factors(n_rows)
        bonds = [_divided(shape[0], row) for shape, row in zip(shapes[1:], rows[1:], strict=True)]
        columns = [_divided(shape[1], bond) for shape, bond in zip(shapes, [*bonds, 1], strict=True)]
        return _checked(cls(rows, tuple(columns), tuple(bonds)), shapes)

    @classmethod
    def of_columns(cls, n_columns: int, shapes: Sequence[Shape]) -> MatrixProduct:
        """Return the form of stored cores of a matrix of so many columns.

        Raises:  ValueError: there is none.
        """
        columns = column_factors(n_columns)
        bonds = [_divided(shape[1], n) for shape, n in zip(shapes[:-1], columns[:-1], strict=True)]
        rows = [_divided(shape[0], bond) for shape, bond in zip(shapes, [1, *bonds], strict=True)]
        return _checked(cls(tuple(rows), columns, tuple(bonds)), shapes)

    @property
    def shape(self) -> Shape:
        """Return the shape of the matrix."""
        return math.prod(self.rows), math.prod(self.columns)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of the stored cores."""
        return tuple((left * row, column * right) for left, row, column, right in self._sites())

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the cores have."""
        return sum(n_rows * n_columns for n_rows, n_columns in self.shapes)

    def matrix(self, cores: Sequence[Tensor]) -> Tensor:
        """Contract cores to the matrix.

        Args:    cores: float[..., b_k o_k, i_k b_k+1]; what comes before is a batch.
        Returns: float[..., n_rows, n_columns].
        """
        import torch

        batch = cores[0].shape[:-2]
        product = cores[0].new_ones(*batch, 1, 1, 1)
        for core, sides in zip(cores, self._sites(), strict=True):
            product = torch.einsum("...oib,...brcd->...oricd", product, core.view(*batch, *sides))
            product = product.flatten(-5, -4).flatten(-3, -2)
        return product.squeeze(-1)

    def _sites(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield the four sides of each core: bond, factor of the rows, factor of the columns, bond."""
        return zip((1, *self.bonds), self.rows, self.columns, (*self.bonds, 1), strict=True)


def _checked(form: MatrixProduct, shapes: Sequence[Shape]) -> MatrixProduct:
    if form.shapes != tuple(shapes):
        raise ValueError(f"shapes {[*shapes]} are not those of a matrix product operator")
    return form


def row_factors(n_rows: int) -> tuple[int, ...]:
    """Return the factors of a number of rows, the largest first."""
    return column_factors(n_rows)[::-1]


def column_factors(n_columns: int) -> tuple[int, ...]:
    """Return the factors of a number of columns, the smallest first."""
    factors = [1] * N_SITES
    for prime in reversed(list(_primes(n_columns))):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(factors))


def _primes(n: int) -> Iterator[int]:
    """Yield the prime factors of a number, the smallest first."""
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            yield divisor
            n //= divisor
        divisor += 1
    if n > 1:
        yield n


def _divided(n: int, divisor: int) -> int:
    if n % divisor:
        raise ValueError(f"{n} is no multiple of {divisor}")
    return n // divisor
