"""A generator from outside: all layers of the model share their vectors."""

from __future__ import annotations

from qpa.circuits.ansatz import make_ansatz
from qpa.generators.chunks import Draft, by_kind, chunked, make_layout, n_qubits_for, with_unique_names
from qpa.generators.generator import GeneratorKind, refuse_budget


class TiedKind(GeneratorKind):
    """A chunk is a vector of a module type and role, the same in every layer."""

    name = "tied"
    words = "vectors that all layers share"

    def check(self, options, spec):
        pass

    def plan(self, options, spec, provenance):
        drafts = []
        for (name, role, length), members in by_kind(spec.tensors).items():
            n_vectors = members[0].n_vectors
            tensors = tuple(chunked(tensor, range(n_vectors)) for tensor in members)
            drafts.append(Draft(f"{name}.{role}", members[0].axis, tensors, n_vectors, length))
        n_circuits, groups, first = options.circuits or 2, [], 0
        for draft in with_unique_names(drafts):
            groups.append(draft.group(range(first, first + draft.n_chunks), n_circuits))
            first += draft.n_chunks
        ansatz = make_ansatz(options.ansatz, n_qubits_for(options, first), options.layers or 2)
        return make_layout(self.name, options, spec, provenance, tuple(groups), ansatz, n_circuits)

    def sizes(self, options, spec):
        raise refuse_budget(options)

    def size_words(self, options):
        return f"circuits {options.circuits}"

    def rate(self, spec):
        return 5e-3
