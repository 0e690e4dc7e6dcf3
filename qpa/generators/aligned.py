"""aligned: a chunk is one vector of the adapter, and random circuits give its features.

Rules:
1. A chunk is a row of lora_A or a column of lora_B, or one vector of another adapter, such as a token's keys.
2. Chunks of the same module type, role and length form a group and share one linear decoder.
3. All groups share the circuits, whose angles start at random.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from qpa.adapters.registry import KINDS
from qpa.circuits.ansatz import make_ansatz
from qpa.documents import AdapterSpec, Provenance, WeightLayout
from qpa.generators.chunks import (
    Draft,
    by_kind,
    check_vectors,
    chunked,
    make_layout,
    n_qubits_for,
    with_unique_names,
)
from qpa.generators.generator import GeneratorKind, L, refuse_budget, refuse_chunk_size
from qpa.generators.layout_options import LayoutOptions

N_CIRCUITS = 8
N_LAYERS = 8
RATE = 3e-3
"""The learning rate for kinds of adapters that do not name one of their own."""


@final
class AlignedKind(GeneratorKind):
    """The default generator of adapters that are no product of two factors."""

    name: ClassVar[str] = "aligned"
    words: ClassVar[str] = "rows of A and columns of B, from circuits with random angles"
    defaults: ClassVar[Mapping[str, str]] = {
        "layers": str(N_LAYERS),
        "circuits": str(N_CIRCUITS),
        "lr": str(RATE),
    }

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse a chunk size."""
        refuse_chunk_size(options, self.name)

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: a group for each module type, role and length, with no gap between chunks."""
        drafts = _drafts(spec)
        n_circuits = options.circuits or _default_circuits(drafts)
        groups, first = [], 0
        for draft in drafts:
            groups.append(draft.group(range(first, first + draft.n_chunks), n_circuits))
            first += draft.n_chunks
        ansatz = make_ansatz(options.ansatz, n_qubits_for(options, first), options.layers or N_LAYERS)
        return make_layout(self.name, options, spec, provenance, tuple(groups), ansatz, n_circuits)

    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Refuse a budget."""
        raise refuse_budget(options)

    def size_words(self, options: LayoutOptions) -> str:
        """Return "circuits 8"."""
        return f"circuits {options.circuits}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate the bench found best at the default number of circuits."""
        rate = KINDS[spec.method].rate
        return RATE if rate is None else rate


ALIGNED = AlignedKind()


def _drafts(spec: AdapterSpec) -> list[Draft]:
    check_vectors(spec)
    drafts = []
    for (name, role, length), members in by_kind(spec.tensors).items():
        tensors, n_chunks = [], 0
        for tensor in members:
            tensors.append(chunked(tensor, range(n_chunks, n_chunks + tensor.n_vectors)))
            n_chunks += tensor.n_vectors
        drafts.append(Draft(f"{name}.{role}", members[0].axis, tuple(tensors), n_chunks, length))
    return with_unique_names(drafts)


def _default_circuits(drafts: list[Draft]) -> int:
    """Return at most half as many circuits as a decoder has chunks."""
    n_chunks = min(draft.n_chunks for draft in drafts)
    return min(N_CIRCUITS, max(1, n_chunks // 2))
