"""From losses of rows to contributions with intervals.

A part contributes loss(changed) - loss(as trained), both of the same rows and weighted as in training. The
interval is a paired percentile bootstrap: `N_BOOTSTRAP` times as many rows as there are are drawn, with
replacement and the same for all parts, and of a part with several permutations as many of these are drawn
too. Its ends are the 2.5th and 97.5th percentile.

So it is an interval over texts, and orders, such as these, for this one trained adapter. It says nothing of
another training with another seed.

Source: ours; percentile bootstrap after Efron, "Bootstrap methods", Annals of Statistics 7 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpa.documents import Contribution
from qpa.errors import DocumentError
from qpa.seeds import split_seed
from qpa.training.evaluation import RowLosses

N_BOOTSTRAP = 2000
LEVEL = 0.95


def contributions(
    trained: RowLosses, changed: Sequence[Sequence[RowLosses]], names: Sequence[str], seed: int
) -> list[Contribution]:
    """Return the contribution of each part.

    Args:    changed: for each part, the losses of the same rows after each of its changes.
             names: of the parts, for errors.
             seed: draws rows and permutations.
    Raises:  DocumentError: a loss is not finite.
    """
    weights = trained.weights
    differences = [torch.stack([one.sums - trained.sums for one in losses]) for losses in changed]
    for name, found in zip(names, differences, strict=True):
        if not torch.isfinite(found).all():
            raise DocumentError(name, "a finite loss without it", "one that is not")
    drawn = torch.split(
        _resampled(torch.cat(differences), weights, seed), [len(one) for one in differences], dim=1
    )
    random = torch.Generator().manual_seed(split_seed(seed, "permutations"))
    contributed = []
    for of_part, values in zip(differences, drawn, strict=True):
        which = torch.randint(len(of_part), (N_BOOTSTRAP, len(of_part)), generator=random)
        contributed.append(_contribution(of_part, values.gather(1, which).mean(1), weights))
    return contributed


def _resampled(differences: Tensor, weights: Tensor, seed: int) -> Tensor:
    """Return the means of differences float64[n, n_rows] over drawn rows, float64[N_BOOTSTRAP, n]."""
    random = torch.Generator().manual_seed(split_seed(seed, "rows"))
    n_rows = len(weights)
    means = torch.empty(N_BOOTSTRAP, len(differences), dtype=torch.float64)
    for index in range(N_BOOTSTRAP):
        rows = torch.randint(n_rows, (n_rows,), generator=random)
        n_times = torch.bincount(rows, minlength=n_rows).double()
        means[index] = differences @ n_times / (weights @ n_times)
    return means


def _contribution(found: Tensor, drawn: Tensor, weights: Tensor) -> Contribution:
    value = float((found.sum(1) / weights.sum()).mean())
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    # Of few rows that differ much, the value itself may be among the outermost draws.
    return Contribution(value=value, low=min(low, value), high=max(high, value))
