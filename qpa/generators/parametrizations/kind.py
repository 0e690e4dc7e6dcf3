"""What a parametrization is, the ones there are, and the layout of an adapter of nothing else.

A parametrization is a fixed function from trained numbers to one tensor of an adapter: the tensor's own
numbers, an orthogonal circuit, or another. It reads no chunk and no circuit's probabilities. A kind counts
the numbers that it trains, and builds one torch module for several tensors of one shape and size.

Adding a kind is a file of its own and a line in `PARAMETRIZATIONS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from qpa.circuits.ansatz import make_ansatz
from qpa.documents import (
    AdapterSpec,
    AdapterTensor,
    Features,
    ParametrizedTensor,
    Provenance,
    TensorShape,
    WeightLayout,
    account_of,
)
from qpa.documents.tensors import Shape
from qpa.documents.weight_layout import NO_FEATURES
from qpa.registry import Registry

if TYPE_CHECKING:
    from torch.nn import Module

Sizes = Mapping[str, int]


class Parametrization(ABC):
    """A kind of parametrization.

    Class attributes: `name` is how documents name it; `replaces_initial` says that the tensor is what the
    module gives, and otherwise that is added to the tensor's initial value.
    """

    name: ClassVar[str]
    replaces_initial: ClassVar[bool] = False

    @abstractmethod
    def n_parameters(self, shape: Shape, sizes: Sizes) -> tuple[int, int]:
        """Return how many angles and how many other numbers one tensor trains."""

    @abstractmethod
    def build(self, shape: Shape, sizes: Sizes, seeds: Sequence[int]) -> Module:
        """Return a module of all tensors of one shape and size, at its initial values.

        Calling it gives float32[n_tensors, *shape]. Of its parameters those of the name "angles" are angles,
        and each has as many numbers for every tensor as `n_parameters` says of one.

        Args:    seeds: one for each tensor, of all that is drawn for it.
        """


PARAMETRIZATIONS: Registry[Parametrization] = Registry(
    "parametrization",
    {
        "numbers": "qpa.generators.parametrizations.numbers:NUMBERS",
        "orthogonal-rows": "qpa.generators.parametrizations.orthogonal:ORTHOGONAL_ROWS",
        "scaled-orthogonal-columns": "qpa.generators.parametrizations.orthogonal:SCALED_ORTHOGONAL_COLUMNS",
        "mpo": "qpa.generators.parametrizations.mpo:MPO",
    },
)


def parametrized(tensor: AdapterTensor, kind: str, **sizes: int) -> ParametrizedTensor:
    """Return the record of an adapter's tensor that a parametrization gives."""
    n_angles, n_own = PARAMETRIZATIONS[kind].n_parameters(tensor.shape, sizes)
    return ParametrizedTensor(
        path=tensor.path,
        shape=tensor.shape,
        kind=kind,
        sizes=tuple(sizes.items()),
        replaces_initial=PARAMETRIZATIONS[kind].replaces_initial,
        n_angles=n_angles,
        n_own=n_own,
    )


def parametrized_layout(
    generator: str, spec: AdapterSpec, provenance: Provenance, tensors: tuple[ParametrizedTensor, ...]
) -> WeightLayout:
    """Return a layout without chunks; tensors of the adapter that are not named stay as they start."""
    paths = {tensor.path for tensor in tensors}
    kept = tuple(TensorShape(path=t.path, shape=t.shape) for t in spec.tensors if t.path not in paths)
    features = Features(
        kind=NO_FEATURES,
        n_circuits=1,
        windows=None,
        registers=(),
        has_index_bits=False,
        n_control=0,
        contexts=None,
    )
    ansatz = make_ansatz("ry-cnot-chain", 1, 1)
    return WeightLayout(
        provenance=provenance,
        generator=generator,
        features=features,
        ansatz=ansatz,
        groups=(),
        parametrized=tensors,
        kept=kept,
        account=account_of(features, ansatz, (), tensors, kept),
        seed=spec.seed,
        budget=None,
        sizes=(),
    )
