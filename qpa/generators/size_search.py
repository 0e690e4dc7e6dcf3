"""From a number of parameters to the size of a generator, among those that its kind offers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic

from qpa.documents import AdapterSpec, PlannedSize
from qpa.errors import OptionError
from qpa.generators.generator import L, kind_for

REFERENCE_RANK = 4
"""A budget in percent is a share of LoRA of this rank on the same modules."""


@dataclass(frozen=True)
class Sized(Generic[L]):
    """Options of a layout, and how many numbers it trains."""

    options: L
    n_trained: int
    nats_per_efold: float

    def predicted_loss(self, chosen: Sized[L]) -> float:
        """Return how much higher its loss is expected than another size's, in nats per token.

        Source:  ours: for each generator a line in log(parameters) through its losses; between two
                 generators the steeper one counts.
        """
        slope = max(self.nats_per_efold, chosen.nats_per_efold)
        return slope * math.log(chosen.n_trained / self.n_trained)


def parse_max_params(text: str, spec: AdapterSpec) -> int:
    """Return a budget such as "5000" or "25%" as a number of parameters, rounded down.

    Raises:  OptionError: neither a number nor a percentage, or not above 0.
    """
    sides = sum(a.shape[1] + b.shape[0] for a, b in spec.pairs)
    return int(parse_budget("max_params", text, REFERENCE_RANK * sides))


def parse_budget(option: str, text: str, n_reference: int) -> float:
    """Return a budget such as "5000" or "25%" of a reference as parameters, at least 1.

    Raises:  OptionError: neither a number nor a percentage, or not above 0.
    """
    try:
        number = float(text.removesuffix("%").replace(",", ""))
    except ValueError:
        number = 0.0
    budget = number / 100 * n_reference if text.endswith("%") else number
    if not 1 <= budget < 2**62:
        raise OptionError(option, "a number of parameters such as 5000, or a share such as 25%", text)
    return budget


def sizes_around(options: L, spec: AdapterSpec, budget: int) -> list[Sized[L]]:
    """Return the largest size within a budget, the two before it, and the next above, by growing size.

    Raises:  OptionError: an option is out of range, or the generator's size is not the planner's to choose.
    """

    @cache
    def n_trained(candidate: L) -> int:
        return kind_for(candidate, spec).n_trained(candidate, spec)

    kind = kind_for(options, spec)
    smaller = list(kind.smaller(options, spec))
    sizes = kind.sizes(options, spec)
    n_dropped = _count_within(sizes, n_trained(smaller[-1]), n_trained) if smaller else 0
    candidates = [*smaller, *sizes[n_dropped:]]
    n_within = _count_within(candidates, budget, n_trained)
    near = candidates[max(0, n_within - 3) : n_within + 1]
    return [Sized(one, n_trained(one), kind_for(one, spec).nats_per_efold) for one in near]


def _count_within(candidates: Sequence[L], budget: int, n_trained: Callable[[L], int]) -> int:
    """Return how many of the candidates, which grow, are within a budget; the large ones are counted last."""
    n = 1
    while n < len(candidates) and n_trained(candidates[n - 1]) <= budget:
        n *= 2
    return bisect_right(candidates, budget, lo=n // 2, hi=min(n, len(candidates)), key=n_trained)


def choose_size(sizes: Sequence[Sized[L]], budget: int) -> Sized[L]:
    """Return the largest size within the budget.

    Raises:  OptionError: the smallest one is larger than the budget.
    """
    fitting = [sized for sized in sizes if sized.n_trained <= budget]
    if not fitting:
        advice = "raise it, or name fewer layers with `targets`"
        raise OptionError("max_params", f"at least {sizes[0].n_trained:,}", f"{budget:,}", advice)
    return fitting[-1]


def size_table(sizes: Sequence[Sized[L]], chosen: Sized[L], spec: AdapterSpec) -> tuple[PlannedSize, ...]:
    """Return what a layout keeps of the sizes it was chosen among."""
    return tuple(
        PlannedSize(
            words=kind_for(sized.options, spec).size_words(sized.options),
            n_trained=sized.n_trained,
            loss_difference=sized.predicted_loss(chosen),
            is_chosen=sized == chosen,
        )
        for sized in sizes
    )
