"""Generators whose size is the rank of their LoRA, and perhaps a depth or a bond dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from qpa.adapters.kind import Rates
from qpa.bench.generated import save_adapter, with_seed
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.generator import GENERATORS, layout_of, make_generator
from qpa.generators.layout_options import LayoutOptions
from qpa.training.generated_adapter import attach_generator


@dataclass(frozen=True)
class Ranked:
    """A generator of LoRA of small ranks at an option's least value, 1, and then at higher values of it.

    Args:    name: as on the command line.
             generator: a name in `GENERATORS`; of a layout without chunks, which reads no directions.
             option: the option, "layers" or "bond_dimension"; None where only the rank makes the size.
             at_every_rank: whether all ranks come with higher values, and not the default rank alone.
    """

    name: str
    generator: str
    rates: Rates
    option: str | None = None
    at_every_rank: bool = False

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return all powers of two as ranks, and with them higher values up to above every budget."""
        default = base.inspect(None)
        specs = [base.inspect(2**n) for n in range(default.rank.bit_length())]
        found = [self._configuration(spec, 1) for spec in specs]
        if self.option is not None:
            for spec in specs if self.at_every_rank else [default]:
                found += self._higher(spec, max(budgets))
        return sorted(found, key=lambda configuration: configuration.n_trained)

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Put an ordinary LoRA on the model and a generator into its optimizer.

        Args:    rate: of own numbers; the angles' is as many times higher as by default.
                 seed: of lora_A and the angles.
        """
        knobs = {name: int(value) for name, value in configuration.knobs}
        spec = with_seed(base.inspect(knobs["rank"]), seed)
        generator = make_generator(self._layout(spec, knobs.get(self.option or "", 1)), seed)
        angle_lr = rate * GENERATORS[self.generator].angle_ratio
        adapted = attach_generator(base.load(), spec, generator, lr=rate, angle_lr=angle_lr)

        def save(folder: Path) -> None:
            save_adapter(adapted.parameters, folder)

        return Attached(adapted.model, adapted.optimizer, save, True)

    def _higher(self, spec: AdapterSpec, budget: int) -> Iterator[Configuration]:
        """Yield the sizes at values above 1, up to the first one above a budget, below LoRA's own."""
        for value in count(2):
            size = self._configuration(spec, value)
            if size.n_trained >= spec.n_numbers:
                return
            yield size
            if size.n_trained > budget:
                return

    def _configuration(self, spec: AdapterSpec, value: int) -> Configuration:
        knobs = (("rank", spec.rank), *(() if self.option is None or value == 1 else ((self.option, value),)))
        label = ", ".join(f"{name} {value}" for name, value in knobs)
        return Configuration(label, knobs, self._layout(spec, value).account.n_generator)

    def _layout(self, spec: AdapterSpec, value: int) -> WeightLayout:
        given: dict[str, Any] = {} if self.option is None else {self.option: value}
        return layout_of(LayoutOptions(generator=self.generator, **given), spec, spec.provenance)


RANKED = {
    method.name: method
    for method in (
        Ranked("qpa:quantum-peft", "quantum-peft", (1.5e-2, 5e-2, 1.5e-1), "layers"),
        Ranked("qpa:direct", "direct", (1e-2, 3e-2, 1e-1)),
        Ranked("qpa:mpo", "mpo", (3e-2, 1e-1, 3e-1), "bond_dimension", at_every_rank=True),
    )
}
