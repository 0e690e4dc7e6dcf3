"""From a number of parameters to the heads and vectors of the spectral layout.

Rules, each with the measurement behind it in docs/results.md:
1. Every module keeps its spectrum: a few numbers shared by all layers, and the most that few numbers buy.
2. Vectors on every module type come before a second head.
3. The more heads, the better, up to the budget; above one a layer they are taken a layer's worth at a time,
   since a window is then one row of one layer.
4. Where not even one head fits with all vectors, the longest vectors are left out first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from qpa.documents import AdapterSpec
from qpa.errors import OptionError

if TYPE_CHECKING:
    from qpa.passes.plan_layout import PlanLayout

REFERENCE_RANK = 4
"""A budget in percent is a share of LoRA of this rank on the same modules."""

NATS_PER_EFOLD = 0.1
"""Loss, in nats per token, that e times as many trained numbers save (docs/results.md, qpa bench)."""


@dataclass(frozen=True)
class SizedPlan:
    """A plan and the numbers it trains."""

    plan: PlanLayout
    n_trained: int

    def predicted_loss(self, chosen: SizedPlan) -> float:
        """Return how much higher its loss is expected than another plan's, in nats per token.

        Source:  ours: a line in log(parameters) through the default's losses, on two bases.
        """
        return NATS_PER_EFOLD * math.log(chosen.n_trained / self.n_trained)


def parse_max_params(text: str, spec: AdapterSpec) -> int:
    """Return a budget such as "5000" or "25%" as a number of parameters, rounded down.

    Raises:  OptionError: neither a number nor a percentage, or not above 0.
    """
    sides = sum(a.shape[1] + b.shape[0] for a, b in spec.pairs)
    return int(parse_budget("--max-params", text, REFERENCE_RANK * sides))


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


def plans_around(plan: PlanLayout, spec: AdapterSpec, budget: int) -> list[SizedPlan]:
    """Return the largest plan within a budget, the two before it, and the next above, by growing size.

    Raises:  OptionError: an option of the plan is out of range.
    """

    @cache
    def n_trained(candidate: PlanLayout) -> int:
        return candidate.layout(spec, spec.provenance).account.n_generator

    plans = candidates(plan, spec)
    n_within = bisect_right(plans, budget, key=n_trained)
    return [SizedPlan(near, n_trained(near)) for near in plans[max(0, n_within - 3) : n_within + 1]]


def choose_size(plan: PlanLayout, spec: AdapterSpec, budget: int) -> SizedPlan:
    """Return the largest plan within the budget.

    Raises:  OptionError: the smallest one is larger than the budget.
    """
    plans = plans_around(plan, spec, budget)
    fitting = [sized for sized in plans if sized.n_trained <= budget]
    if not fitting:
        advice = "raise it, or name fewer layers with --targets"
        raise OptionError("--max-params", f"at least {plans[0].n_trained:,}", f"{budget:,}", advice)
    return fitting[-1]


def candidates(plan: PlanLayout, spec: AdapterSpec) -> list[PlanLayout]:
    """Return the plans the rules consider, from the smallest to the largest."""
    types = _types_by_length(spec)
    chosen = [tuple(types[:n_types]) or ("none",) for n_types in range(len(types) if plan.spectrum else 0)]
    n_layers = spec.n_layers
    heads = [*range(1, n_layers + 1), *range(2 * n_layers, n_layers * spec.rank, n_layers)]
    unsized = replace(plan, max_params=None)
    return [replace(unsized, heads=1, vectors=vectors) for vectors in chosen] + [
        replace(unsized, heads=n_heads) for n_heads in heads
    ]


def _types_by_length(spec: AdapterSpec) -> list[str]:
    """Return the module types, those with the fewest numbers a head first."""
    lengths: dict[str, int] = {}
    for a, b in spec.pairs:
        lengths[a.module_type] = max(lengths.get(a.module_type, 0), a.shape[1] + b.shape[0])
    return sorted(lengths, key=lambda name: lengths[name])
