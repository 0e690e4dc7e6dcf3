"""Matrices as chains of small arrays: what they contract to, and how sides are divided."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpa.adapters.matrix_product import N_SITES, MatrixProduct, column_factors, row_factors

SIDES = st.integers(1, 300)


@pytest.mark.parametrize(("rows", "columns", "bond"), [(172, 4, 3), (5, 64, 4), (12, 18, 2), (1, 7, 1)])
def test_the_matrix_is_the_sum_over_all_bonds(rows: int, columns: int, bond: int) -> None:
    form = MatrixProduct.of(rows, columns, bond)
    cores = [torch.randn(shape, dtype=torch.float64) for shape in form.shapes]
    sides = zip((1, *form.bonds), form.rows, form.columns, (*form.bonds, 1), strict=True)
    arrays = [core.numpy().reshape(four) for core, four in zip(cores, sides, strict=True)]
    expected = np.zeros((rows, columns))
    for row, ups in enumerate(product(*map(range, form.rows))):
        for column, downs in enumerate(product(*map(range, form.columns))):
            chain = [array[:, up, down] for array, up, down in zip(arrays, ups, downs, strict=True)]
            expected[row, column] = np.linalg.multi_dot(chain).item()
    np.testing.assert_allclose(form.matrix(cores).numpy(), expected, atol=1e-12)


def test_a_batch_is_contracted_as_each_of_it() -> None:
    form = MatrixProduct.of(8, 12, 3)
    cores = [torch.randn(5, *shape) for shape in form.shapes]
    each = [form.matrix([core[n] for core in cores]) for n in range(5)]
    torch.testing.assert_close(form.matrix(cores), torch.stack(each))


@given(SIDES, SIDES, st.integers(1, 6))
def test_the_factors_make_the_sides_and_the_shapes_tell_the_form(rows: int, columns: int, bond: int) -> None:
    form = MatrixProduct.of(rows, columns, bond)
    assert form.shape == (rows, columns)
    assert [len(form.rows), len(form.columns), len(form.bonds)] == [N_SITES, N_SITES, N_SITES - 1]
    assert 1 <= min(form.bonds) <= max(form.bonds) <= bond
    assert MatrixProduct.of_rows(rows, form.shapes) == form
    assert MatrixProduct.of_columns(columns, form.shapes) == form


@pytest.mark.parametrize(
    ("side", "factors"),
    [
        (64, (4, 4, 4)),
        (172, (2, 2, 43)),
        (4096, (16, 16, 16)),
        (14336, (16, 28, 32)),
        (13, (1, 1, 13)),
        (1, (1, 1, 1)),
    ],
)
def test_sides_are_divided_evenly(side: int, factors: tuple[int, ...]) -> None:
    assert column_factors(side) == factors
    assert row_factors(side) == factors[::-1]


def test_with_bonds_that_are_large_enough_it_is_any_matrix() -> None:
    form = MatrixProduct.of(8, 8, 16)
    cores = [torch.randn(shape, requires_grad=True) for shape in form.shapes]
    columns = [
        torch.autograd.grad(number, cores, retain_graph=True) for number in form.matrix(cores).flatten()
    ]
    jacobian = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in columns])
    assert int(torch.linalg.matrix_rank(jacobian)) == 64
    assert form.bonds == (4, 4) and MatrixProduct.of(8, 8, 1).bonds == (1, 1)


@pytest.mark.parametrize(
    "shapes", [((4, 4), (4, 4), (5, 4)), ((3, 4), (8, 8), (8, 4)), ((4, 8), (6, 8), (8, 4))]
)
def test_other_shapes_are_refused(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"no multiple|are not those of a matrix product operator"):
        MatrixProduct.of_rows(64, shapes)
