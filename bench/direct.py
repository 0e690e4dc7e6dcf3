"""The other kinds of adapters, trained without a generator: the generated ones are compared with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from qpa.adapters.attach import adapter_parameters, attach_adapter
from qpa.adapters.kind import Rates
from qpa.adapters.parameter_view import leaf_of
from qpa.adapters.registry import KINDS
from qpa.bench.generated import save_adapter, with_seed
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.errors import OptionError

MAX_RANK = 256


@dataclass(frozen=True)
class Direct:
    """An adapter whose own numbers are trained by AdamW, of the ranks that meet the budgets.

    Args:    name: as on the command line, and the method of `InspectModel`.
             has_rank: whether it comes in several sizes.
    """

    name: str
    rates: Rates
    has_rank: bool = True

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return the ranks below and above each budget."""
        if not self.has_rank:
            return [Configuration("its only size", (), base.inspect(None, self.name).n_numbers)]
        if tried := KINDS[self.name].direct_ranks:
            return list(self._sizes_of(base, tried))
        smallest, second = (base.inspect(rank, self.name).n_numbers for rank in (1, 2))
        first = [1 + (budget - smallest) // (second - smallest) for budget in budgets]
        sides = [t.vector_length for pair in base.inspect(1, self.name).pairs for t in pair]
        largest = min([MAX_RANK, *sides])
        ranks = {min(max(1, rank + more), largest) for rank in first for more in (0, 1)}
        return [
            Configuration(f"r={rank}", (("r", rank),), smallest + (rank - 1) * (second - smallest))
            for rank in sorted(ranks)
        ]

    def _sizes_of(self, base: BenchBase, ranks: Sequence[int]) -> Iterator[Configuration]:
        """Yield the sizes of the ranks that the model takes."""
        for rank in ranks:
            with suppress(OptionError):
                n_trained = base.inspect(rank, self.name).n_numbers
                yield Configuration(f"r={rank}", (("r", rank),), n_trained)

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Put the adapter on a fresh model.

        Args:    rate: peak learning rate of AdamW.
                 seed: of the initial values.
        """
        knobs = dict(configuration.knobs)
        spec = with_seed(base.inspect(int(knobs["r"]) if knobs else None, self.name), seed)
        model = attach_adapter(base.load(), spec)
        parameters = adapter_parameters(model, spec)
        leaves = list(dict.fromkeys(leaf_of(parameter) for parameter in parameters.values()))
        optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
        return Attached(model, optimizer, lambda folder: save_adapter(parameters, folder), False)


DIRECT = {
    name: Direct(name, rates, KINDS[name].has_rank)
    for name in KINDS
    if (rates := KINDS[name].direct_rates) is not None
}
