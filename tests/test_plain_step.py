"""A step of a loop without a trainer."""

from __future__ import annotations

import pytest
import torch

from qpa.errors import DivergedError
from qpa.training.plain_step import MAX_NORM, take_step


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([3.0, 4.0]))


def test_a_step_follows_the_clipped_gradient_and_forgets_it(weight: torch.nn.Parameter) -> None:
    take_step(torch.optim.SGD([weight], lr=0.5), 100 * weight.square().sum())
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.5 * MAX_NORM / 5))
    assert weight.grad is None


def test_a_loss_that_nothing_trained_is_in_moves_nothing(weight: torch.nn.Parameter) -> None:
    take_step(torch.optim.SGD([weight], lr=0.5), torch.tensor(1.0))
    assert weight.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_anything_moves(
    weight: torch.nn.Parameter, factor: float
) -> None:
    with pytest.raises(DivergedError, match="expected a finite loss and gradient"):
        take_step(torch.optim.SGD([weight], lr=0.5), factor * weight.sum())
    assert weight.tolist() == [3.0, 4.0]
