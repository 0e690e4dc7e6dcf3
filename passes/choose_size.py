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
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """Return a budget such as "5000" or "25%" as a number of parameters.

    Raises:  OptionError: neither a whole number nor a percentage, or not above 0.
    """
    sides = sum(a.shape[1] + b.shape[0] for a, b in zip(spec.tensors[::2], spec.tensors[1::2], strict=True))
    try:
        number = float(text.removesuffix("%").replace(",", ""))
    except ValueError:
        number = 0.0
    budget = number / 100 * REFERENCE_RANK * sides if text.endswith("%") else number
    if not 1 <= budget < 2**62:
        raise OptionError("--max-params", "a number of parameters such as 5000, or a share such as 25%", text)
    return int(budget)


def sized_plans(plan: PlanLayout, spec: AdapterSpec, budget: int) -> list[SizedPlan]:
    """Return the plans the rules consider, from the smallest to the first above the budget.

    Raises:  OptionError: an option of the plan is out of range.
    """
    found: list[SizedPlan] = []
    for candidate in _candidates(plan, spec):
        n_trained = candidate.layout(spec, spec.provenance).account.n_generator
        found.append(SizedPlan(candidate, n_trained))
        if n_trained > budget:
            break
    return sorted(found, key=lambda sized: sized.n_trained)


def choose_size(plan: PlanLayout, spec: AdapterSpec, budget: int) -> SizedPlan:
    """Return the largest plan within the budget.

    Raises:  OptionError: the smallest one is larger than the budget.
    """
    plans = sized_plans(plan, spec, budget)
    fitting = [sized for sized in plans if sized.n_trained <= budget]
    if not fitting:
        advice = "raise it, or name fewer layers with --targets"
        raise OptionError("--max-params", f"at least {plans[0].n_trained:,}", f"{budget:,}", advice)
    return fitting[-1]


def _candidates(plan: PlanLayout, spec: AdapterSpec) -> Iterator[PlanLayout]:
    """Yield plans of growing size."""
    types = _types_by_length(spec)
    for n_types in range(len(types) if plan.spectrum else 0):
        yield replace(plan, max_params=None, heads=1, vectors=tuple(types[:n_types]) or ("none",))
    n_layers = max(sum(t.module_type == name for t in spec.tensors[::2]) for name in types)
    heads = [*range(1, n_layers + 1), *range(2 * n_layers, n_layers * spec.rank, n_layers)]
    for n_heads in heads:
        yield replace(plan, max_params=None, heads=n_heads)


def _types_by_length(spec: AdapterSpec) -> list[str]:
    """Return the module types, those with the fewest numbers a head first."""
    lengths: dict[str, int] = {}
    for a, b in zip(spec.tensors[::2], spec.tensors[1::2], strict=True):
        lengths[a.module_type] = max(lengths.get(a.module_type, 0), a.shape[1] + b.shape[0])
    return sorted(lengths, key=lambda name: lengths[name])
