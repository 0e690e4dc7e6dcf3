"""mpo: a tensor that is a matrix product operator, whose cores are trained.

Rules:
1. Factors, bonds and cores are those of `qpa.adapters.matrix_product`.
2. The cores start uniform, all of one variance, such that the tensor's numbers have the variance with which
   LoRA draws lora_A, 1 / (3 in); or, where the tensor starts at zero, the variance 1, but for the last core,
   which starts at zero.

Source:  tensor-train matrices, arXiv 1509.06569; in LoRA's factors: arXiv 2503.12790. The start is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, final

from qpa.adapters.matrix_product import MatrixProduct
from qpa.documents.tensors import Shape
from qpa.generators.parametrizations.kind import Parametrization, Sizes

if TYPE_CHECKING:
    from torch.nn import Module


@final
class MpoKind(Parametrization):
    """A matrix product operator. Its sizes are `bond_dimension`, and `starts_at_zero`, 1 or 0."""

    name: ClassVar[str] = "mpo"
    replaces_initial: ClassVar[bool] = True

    def n_parameters(self, shape: Shape, sizes: Sizes) -> tuple[int, int]:
        """Return no angle, and the numbers of all cores."""
        return 0, MatrixProduct.of(*shape, sizes["bond_dimension"]).n_numbers

    def build(self, shape: Shape, sizes: Sizes, seeds: Sequence[int]) -> Module:
        """Return the cores."""
        from qpa.generators.parametrizations.mpo_cores import Cores

        form = MatrixProduct.of(*shape, sizes["bond_dimension"])
        return Cores(form, seeds, starts_at_zero=bool(sizes["starts_at_zero"]))


MPO = MpoKind()
