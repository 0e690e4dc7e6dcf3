"""mpo: both factors of every module are matrix product operators, the static part of QTHA.

Rules:
1. lora_A and lora_B of every module are matrix product operators, whose cores are trained
   (`qpa.generators.parametrizations.mpo`). The bond dimension decides how many numbers that are, and so does
   the rank of the adapter.
2. lora_B starts at zero, so that delta W is exactly zero at the start. In an adapter that goes on from
   another one, what is added to both factors starts at zero.
3. Vectors that are no part of a product, such as DoRA's magnitudes, stay as the base model gives them.
4. From a number of parameters to a size: the largest bond dimension that fits. From the largest useful bond
   on, the factors are any matrices.

Source: arXiv 2503.12790, without its circuit. It gives no bond dimension and no number of sites: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, final

from qpa.adapters.matrix_product import BOND_DIMENSION, MatrixProduct
from qpa.documents import AdapterSpec, Provenance, WeightLayout
from qpa.errors import OptionError
from qpa.generators.generator import GeneratorKind, L, check_product, refuse_options
from qpa.generators.layout_options import LayoutOptions
from qpa.generators.parametrizations.kind import parametrized, parametrized_layout

RATE = 5e-2
"""Half of the best rate of the bench; at three times the best, training diverges."""


@final
class MpoGenerator(GeneratorKind):
    """The generator whose numbers are cores of matrix product operators."""

    name: ClassVar[str] = "mpo"
    words: ClassVar[str] = "factors that are matrix product operators"
    origin: ClassVar[str] = "products of small trained arrays, so-called matrix product operators"
    needs_product: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, str]] = {"bond_dimension": str(BOND_DIMENSION), "lr": str(RATE)}
    own_options: ClassVar[tuple[str, ...]] = ("bond_dimension",)

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse an adapter that is no product of factors, and all options but the bond dimension."""
        check_product(spec, self.name)
        refuse_options(options, self.name, self.own_options)

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: every factor by itself."""
        bond_dimension = options.bond_dimension or BOND_DIMENSION
        tensors = tuple(
            parametrized(
                tensor,
                self.name,
                bond_dimension=bond_dimension,
                starts_at_zero=int(starts_at_zero or spec.parent is not None),
            )
            for pair in spec.pairs
            for tensor, starts_at_zero in zip(pair, (False, True), strict=True)
        )
        return parametrized_layout(self.name, spec, provenance, tensors)

    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Return all bond dimensions that make a difference."""
        if options.bond_dimension is not None:
            expected = "no `bond_dimension`, which it would choose"
            raise OptionError("max_params", expected, str(options.max_params), "leave one out")
        shapes = {tensor.shape for pair in spec.pairs for tensor in pair}
        largest = max(max(MatrixProduct.of(*shape, max(shape)).bonds) for shape in shapes)
        unsized = replace(options, max_params=None)
        return [replace(unsized, bond_dimension=bond) for bond in range(1, largest + 1)]

    def size_words(self, options: LayoutOptions) -> str:
        """Return "bond dimension 4"."""
        return f"bond dimension {options.bond_dimension}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the default rate."""
        return RATE


MPO = MpoGenerator()
