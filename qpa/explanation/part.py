"""A part of a trained generator, and what is changed of the generator to see what the part contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qpa.documents import AdapterSpec, ChunkedTensor, ChunkGroup, WeightLayout
from qpa.generators.generator import load_generator, make_generator
from qpa.seeds import split_seed


@dataclass(frozen=True)
class Change:
    """What of a trained generator is another; everything else is as trained.

    Args:    arrays: arrays that take the place of those of their names.
             probabilities: float32[n_circuits, 2**n_qubits]; None: as they were measured.
             features: float32[2**n_qubits, n_features]; None: what the probabilities give.
             reset: paths of the adapter's tensors that are as they start.
    """

    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    probabilities: Tensor | None = None
    features: Tensor | None = None
    reset: frozenset[str] = frozenset()


Making = Callable[[], Change]
"""A function that makes a change: the arrays of all changes at once might not fit the memory."""


@dataclass(frozen=True)
class Part:
    """A part to be explained.

    Args:    kind, name: see `qpa.documents.ExplainedPart`.
             ablated: makes the change that leaves it out.
             permuted: make changes that put its values in another order; each is one draw of several.
    """

    kind: str
    name: str
    ablated: Making | None = None
    permuted: tuple[Making, ...] = ()

    @property
    def groups(self) -> tuple[tuple[Making, ...], ...]:
        """Return the changes whose losses make one contribution each, that of the ablation first."""
        return (*([(self.ablated,)] if self.ablated else []), *([self.permuted] if self.permuted else []))


class Placed(NamedTuple):
    """A chunk, and where it first stands in the adapter.

    Args:    group_index: of its group in the layout.
             group: its group.
             tensor: the first tensor that it fills.
             number: which of this tensor's chunks it is.
             state: its basis state.
             chunk: its number in the group.
    """

    group_index: int
    group: ChunkGroup
    tensor: ChunkedTensor
    number: int
    state: int
    chunk: int


def placed_chunks(layout: WeightLayout) -> Iterator[Placed]:
    """Yield the chunks of rows, columns and spectra, each once, though it may fill several tensors."""
    for index, group in enumerate(layout.groups):
        seen: set[int] = set()
        for tensor in group.tensors:
            for number, chunk in enumerate(tensor.chunks):
                if chunk not in seen:
                    seen.add(chunk)
                    yield Placed(index, group, tensor, number, group.states[chunk], chunk)


@dataclass(frozen=True)
class Subject:
    """A trained generator that is to be explained.

    Args:    arrays: of the TrainedGenerator, by name.
             probabilities: float32[n_circuits, 2**n_qubits], as measured; None for a control.
             vector: of the context that was measured, float32[size]; None where the layout has none.
             features, start: float32[2**n_qubits, n_features], what decoders see now, and saw before the
             first step; empty for a generator without chunks.
             n_permutations: of a part that has several.
             seed: of the permutations.
    """

    spec: AdapterSpec
    layout: WeightLayout
    arrays: Mapping[str, Tensor]
    probabilities: Tensor | None
    vector: Tensor | None
    features: Tensor
    start: Tensor
    n_permutations: int
    seed: int

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        spec: AdapterSpec,
        layout: WeightLayout,
        arrays: Mapping[str, Tensor],
        probabilities: Tensor | None,
        vector: Tensor | None = None,
        *,
        n_permutations: int,
        seed: int,
    ) -> Subject:
        """Return the subject with the features of its start and of now."""
        if not layout.groups:
            nothing = torch.empty(0)
            return cls(spec, layout, arrays, probabilities, vector, nothing, nothing, n_permutations, seed)
        untrained = make_generator(layout, layout.seed)
        start = untrained.features(untrained.run()).detach()
        features = load_generator(layout, arrays, vector).features(probabilities).detach()
        return cls(spec, layout, arrays, probabilities, vector, features, start, n_permutations, seed)

    @property
    def n_copied(self) -> int:
        """Return how many features of a chunk, the first ones, are bits of its number and not trained."""
        return self.layout.n_features - self.layout.n_circuits

    @property
    def measured(self) -> Tensor:
        """Return the probabilities of circuits, which are there."""
        assert self.probabilities is not None
        return self.probabilities

    def orders(self, name: str, n: int) -> Iterator[list[int]]:
        """Yield orders of n things, none of which is the one that they have; for fewer than two, nothing."""
        random = torch.Generator().manual_seed(split_seed(self.seed, f"explain {name}"))
        for _ in range(self.n_permutations if n > 1 else 0):
            order = list(range(n))
            while order == sorted(order):
                order = torch.randperm(n, generator=random).tolist()
            yield order
