"""direct: the adapter's own numbers are trained, as they are where there is no generator.

Rules:
1. Every tensor is its initial value and numbers of its own, which start at zero (`numbers` in
   `qpa.generators.parametrizations`).
2. The rank decides how many numbers are trained, and nothing else does.

It is the control of all other generators, and suits adapters whose numbers are few.

Source: ours; with LoRA it is LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from qpa.adapters.registry import KINDS
from qpa.documents import AdapterSpec, Provenance, WeightLayout
from qpa.errors import OptionError
from qpa.generators.generator import GeneratorKind, L, refuse_options
from qpa.generators.layout_options import LayoutOptions
from qpa.generators.parametrizations.kind import parametrized, parametrized_layout

RATE = 1e-2
"""The learning rate of LoRA; see docs/results.md for those of small ranks, which are higher."""


@final
class DirectKind(GeneratorKind):
    """The generator that generates nothing."""

    name: ClassVar[str] = "direct"
    words: ClassVar[str] = "the adapter's own numbers, as without a generator"
    origin: ClassVar[str] = "trained one by one, without a generator"
    defaults: ClassVar[Mapping[str, str]] = {"lr": str(RATE)}

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse all options but those that the adapter itself has."""
        refuse_options(options, self.name, tuple(KINDS[spec.method].more_options))

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: every tensor by itself."""
        tensors = tuple(parametrized(tensor, "numbers") for tensor in spec.tensors)
        return parametrized_layout(self.name, spec, provenance, tensors)

    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Refuse a budget."""
        expected = f"no budget with `generator` {self.name}, whose size is the adapter's"
        raise OptionError("max_params", expected, str(options.max_params), "lower `rank` or name `targets`")

    def size_words(self, options: LayoutOptions) -> str:
        """Return "direct"."""
        return self.name

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate that a kind of adapter names for this generator, or the middle one of its bench."""
        kind = KINDS[spec.method]
        if kind.rate is not None and kind.default_generator == self.name:
            return kind.rate
        return RATE if kind.direct_rates is None else kind.direct_rates[1]


DIRECT = DirectKind()
