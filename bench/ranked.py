"""Generators whose size is the rank of their LoRA, and perhaps a depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpa.adapters.kind import Rates
from qpa.bench.generated import save_adapter, with_seed
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.generator import GENERATORS, layout_of, make_generator
from qpa.generators.layout_options import LayoutOptions
from qpa.training.generated_adapter import attach_generator


@dataclass(frozen=True)
class Ranked:
    """A generator of LoRA of small ranks, and then of the default rank and more layers.

    Args:    name: as on the command line.
             generator: a name in `GENERATORS`; of a layout without chunks, which reads no directions.
             has_layers: whether it takes `layers`.
    """

    name: str
    generator: str
    rates: Rates
    has_layers: bool

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return all powers of two as ranks, and the layers below and above each budget."""
        spec = base.inspect(None)
        found = [self._configuration(base.inspect(2**n), None) for n in range(spec.rank.bit_length())]
        layers = self._layers(spec, budgets) if self.has_layers else ()
        found += [self._configuration(spec, n) for n in layers]
        return sorted(found, key=lambda configuration: configuration.n_trained)

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Put an ordinary LoRA on the model and a generator into its optimizer.

        Args:    rate: of own numbers; the angles' is as many times higher as by default.
                 seed: of lora_A and the angles.
        """
        knobs = {name: int(value) for name, value in configuration.knobs}
        spec = with_seed(base.inspect(knobs["rank"]), seed)
        generator = make_generator(self._layout(spec, knobs.get("layers")), seed)
        angle_lr = rate * GENERATORS[self.generator].angle_ratio
        adapted = attach_generator(base.load(), spec, generator, lr=rate, angle_lr=angle_lr)

        def save(folder: Path) -> None:
            save_adapter(adapted.parameters, folder)

        return Attached(adapted.model, adapted.optimizer, save, True)

    def _layers(self, spec: AdapterSpec, budgets: Sequence[int]) -> Iterator[int]:
        """Yield the depths above one layer that surround the budgets; a size is linear in its layers."""
        first, second = (self._layout(spec, n).account.n_generator for n in (1, 2))
        depths = {1 + (budget - first) // (second - first) + more for budget in budgets for more in (0, 1)}
        yield from sorted(depth for depth in depths if depth > 1)

    def _configuration(self, spec: AdapterSpec, layers: int | None) -> Configuration:
        knobs = (("rank", spec.rank), *(() if layers is None else (("layers", layers),)))
        label = ", ".join(f"{name} {value}" for name, value in knobs)
        return Configuration(label, knobs, self._layout(spec, layers).account.n_generator)

    def _layout(self, spec: AdapterSpec, layers: int | None) -> WeightLayout:
        return layout_of(LayoutOptions(generator=self.generator, layers=layers), spec, spec.provenance)


RANKED = {
    method.name: method
    for method in (
        Ranked("qpa:quantum-peft", "quantum-peft", (1.5e-2, 5e-2, 1.5e-1), has_layers=True),
        Ranked("qpa:direct", "direct", (1e-2, 3e-2, 1e-1), has_layers=False),
    )
}
