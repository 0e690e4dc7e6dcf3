"""quantum-peft: the factors of a weight's change are columns of orthogonal circuits.

The change of a module's weight is U Lambda V^T times LoRA's factor alpha / rank. U and V have K orthonormal
columns, those of circuits of RY and CZ, and Lambda is a diagonal of K numbers.

Rules:
1. lora_A is V^T and lora_B is U Lambda, so the adapter is a LoRA, exactly (`orthogonal-rows` and
   `scaled-orthogonal-columns` in `qpa.generators.parametrizations`). K is its rank.
2. A side of N numbers, N a power of two, takes (2L+1) log2(N) - 2L angles; other sides take two such circuits
   (`qpa.circuits.two_design`). Every module has circuits of its own.
3. Lambda starts at zero and angles at random, so the adapter changes nothing at first.
4. Vectors that are no part of a product, such as DoRA's magnitudes, stay as the base model gives them.
5. A budget chooses the layers. The rank costs one number a module, and is the user's.

Circuits are simulated in training alone. Their columns are read as real amplitudes, which no device measures.

Source: Quantum-PEFT, arXiv 2503.05431; rules 3 to 5, and sides that are no power of two, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, final

from qpa.documents import AdapterSpec, Provenance, WeightLayout
from qpa.errors import OptionError
from qpa.generators.generator import GeneratorKind, L, check_product, refuse_options
from qpa.generators.layout_options import LayoutOptions
from qpa.generators.parametrizations.kind import parametrized, parametrized_layout

N_LAYERS = 1
MAX_LAYERS = 64
"""The most layers that a budget buys."""
RATE = 5e-2
ANGLE_RATIO = 3.0
"""Angles move columns little where a rate suits Lambda: three times as high is better at ranks 1 and 32."""


@final
class QuantumPeftKind(GeneratorKind):
    """A generator of products of two factors by orthogonal circuits."""

    name: ClassVar[str] = "quantum-peft"
    words: ClassVar[str] = "columns of orthogonal circuits, simulated and not measured, arXiv 2503.05431"
    origin: ClassVar[str] = (
        "columns of small orthogonal quantum circuits, which were simulated and then left behind"
    )
    defaults: ClassVar[Mapping[str, str]] = {"layers": str(N_LAYERS), "lr": str(RATE)}
    needs_product: ClassVar[bool] = True
    angle_ratio: ClassVar[float] = ANGLE_RATIO

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse adapters whose factors cannot be orthogonal, and all options of chunks."""
        check_product(spec, self.name)
        refuse_options(options, self.name, ("layers",))
        if spec.parent is not None:
            expected = "a generator that can go on from an adapter, whose factors are not orthogonal"
            raise OptionError("generator", expected, self.name, "export it merged, and go on from that model")
        smallest = min(side for a, b in spec.pairs for side in (a.shape[1], b.shape[0]))
        if smallest < 2:
            raise OptionError("targets", f"sides of at least 2 with `generator` {self.name}", str(smallest))

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: two tensors for every module, with circuits of their own."""
        layers = options.layers or N_LAYERS
        tensors = tuple(
            tensor
            for a, b in spec.pairs
            for tensor in (
                parametrized(a, "orthogonal-rows", layers=layers),
                parametrized(b, "scaled-orthogonal-columns", layers=layers),
            )
        )
        return parametrized_layout(self.name, spec, provenance, tensors)

    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Return circuits of growing depth."""
        if options.layers is not None:
            expected = "no `layers`, which it would choose"
            raise OptionError("max_params", expected, str(options.max_params), "leave one out")
        return [replace(options, layers=n, max_params=None) for n in range(1, MAX_LAYERS + 1)]

    def size_words(self, options: LayoutOptions) -> str:
        """Return "layers 3"."""
        return f"layers {options.layers}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate of Lambda; that of the angles is three times as high."""
        return RATE


QUANTUM_PEFT = QuantumPeftKind()
