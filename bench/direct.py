"""The other kinds of adapters, trained without a generator: the generated ones are compared with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qpa.adapters.attach import adapter_parameters, attach_adapter
from qpa.adapters.kind import Rates, Request
from qpa.adapters.parameter_view import leaf_of
from qpa.adapters.registry import KINDS
from qpa.bench.generated import save_adapter, with_seed
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.documents import AdapterSpec
from qpa.errors import OptionError

MAX_RANK = 256


@dataclass(frozen=True)
class Direct:
    """An adapter whose own numbers are trained by AdamW, of the sizes that meet the budgets.

    Args:    name: as on the command line.
             rates: peak learning rates to try.
             method: that of `InspectModel`.
             asked: what is asked of the method at every size.
    """

    name: str
    rates: Rates
    method: str
    asked: Request = field(default_factory=Request)

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return the ranks below and above each budget, or the sizes that the kind names."""
        kind = KINDS[self.method]
        if kind.direct_sizes:
            return list(self._asked_for(base, kind.direct_sizes))
        if not kind.has_rank:
            return [Configuration("its only size", (), self._spec(base, {}).n_numbers)]
        smallest, second = (self._spec(base, {"r": rank}).n_numbers for rank in (1, 2))
        first = [1 + (budget - smallest) // (second - smallest) for budget in budgets]
        sides = [t.vector_length for pair in self._spec(base, {"r": 1}).pairs for t in pair]
        largest = min([MAX_RANK, *sides])
        ranks = {min(max(1, rank + more), largest) for rank in first for more in (0, 1)}
        return [
            Configuration(f"r={rank}", (("r", rank),), smallest + (rank - 1) * (second - smallest))
            for rank in sorted(ranks)
        ]

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Put the adapter on a fresh model.

        Args:    rate: peak learning rate of AdamW.
                 seed: of the initial values.
        """
        spec = with_seed(self._spec(base, dict(configuration.knobs)), seed)
        model = attach_adapter(base.load(), spec)
        parameters = adapter_parameters(model, spec)
        leaves = list(dict.fromkeys(leaf_of(parameter) for parameter in parameters.values()))
        optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
        return Attached(model, optimizer, lambda folder: save_adapter(parameters, folder), False)

    def _asked_for(self, base: BenchBase, requests: Iterable[Request]) -> Iterator[Configuration]:
        """Yield the sizes of the requests that the model takes."""
        for request in requests:
            knobs = {
                ("r" if name == "rank" else name): value
                for name, value in asdict(request).items()
                if value is not None
            }
            label = ", ".join(f"{name.replace('_', ' ')}={value}" for name, value in knobs.items())
            with suppress(OptionError):
                yield Configuration(label, tuple(knobs.items()), self._spec(base, knobs).n_numbers)

    def _spec(self, base: BenchBase, knobs: Mapping[str, Any]) -> AdapterSpec:
        """Return the adapter of a size; a rank has been called r in the files of results."""
        options = {("rank" if name == "r" else name): value for name, value in knobs.items()}
        always = {name: value for name, value in asdict(self.asked).items() if value is not None}
        return base.inspect(options.pop("rank", None), self.method, **always, **options)


DIRECT = {
    method.name: method
    for kind in KINDS
    if (rates := KINDS[kind].direct_rates) is not None
    for method in (
        Direct(kind, rates, kind),
        *(Direct(f"{kind}:{name}", rates, kind, asked) for name, asked in KINDS[kind].bench_variants.items()),
    )
}
