"""Vectors: rows of lora_A and columns of lora_B that are generated, as groups over all layers."""

from __future__ import annotations

from qpa.documents import AdapterSpec, AdapterTensor
from qpa.documents.weight_layout import ChunkAxis
from qpa.errors import OptionError
from qpa.generators.chunks import Draft, by_kind, chunked
from qpa.generators.layout_options import ALL, NONE

PairsBySides = dict[tuple[str, int, int], list[tuple[AdapterTensor, AdapterTensor]]]

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
"""Module types that, in one parent module, read the same activations."""


def module_types(names: tuple[str, ...], spec: AdapterSpec) -> set[str]:
    """Return the module types that `vectors` names.

    Raises:  OptionError: one is not of this adapter.
    """
    types = {tensor.module_type for tensor in spec.tensors}
    chosen = types if ALL in names else set(names) - {NONE}
    if chosen - types:
        unknown = ", ".join(sorted(chosen - types))
        raise OptionError("vectors", "all, none, or some of " + ", ".join(sorted(types)), unknown)
    return chosen


def pairs_by_sides(spec: AdapterSpec) -> PairsBySides:
    """Gather pairs of lora_A and lora_B by module type, inputs and outputs."""
    gathered: PairsBySides = {}
    for a, b in spec.pairs:
        gathered.setdefault((a.module_type, a.shape[1], b.shape[0]), []).append((a, b))
    return gathered


def types_by_length(spec: AdapterSpec) -> list[str]:
    """Return the module types, those with the fewest numbers per circuit first."""
    lengths: dict[str, int] = {}
    for a, b in spec.pairs:
        lengths[a.module_type] = max(lengths.get(a.module_type, 0), a.shape[1] + b.shape[0])
    return sorted(lengths, key=lambda name: lengths[name])


def types_that_write(spec: AdapterSpec) -> list[str]:
    """Return the module types that write to the residual stream, those with the fewest numbers first.

    Their outputs are as many as most modules' inputs, and they share their own inputs with no other type.
    """
    sides = [a.shape[1] for a, _ in spec.pairs]
    width = max(set(sides), key=sides.count)
    reading = {name for names in SAME_INPUT for name in names}
    writing = {a.module_type for a, b in spec.pairs if b.shape[0] == width} - reading
    return [name for name in types_by_length(spec) if name in writing]


def vector_drafts(spec: AdapterSpec, n_rows: int, types: set[str], *, share_inputs: bool) -> list[Draft]:
    """Return groups of generated rows of lora_A and columns of lora_B.

    Args:    n_rows: generated rows of every lora_A.
             types: module types that have generated rows and columns.
             share_inputs: modules that read the same activations share the rows of their lora_A.
    """
    factors = [tensor for pair in spec.pairs for tensor in pair if tensor.module_type in types]
    shared = {a.path: _input_name(a.module_type) for a, _ in spec.pairs} if share_inputs else {}
    return _drafts(factors, n_rows, shared)


def drafts_alone(spec: AdapterSpec, n_rows: int) -> list[Draft]:
    """Return groups of the vectors that are no part of a product, such as DoRA's magnitudes."""
    in_pairs = {tensor.path for pair in spec.pairs for tensor in pair}
    return _drafts([tensor for tensor in spec.tensors if tensor.path not in in_pairs], n_rows, {})


def _drafts(tensors: list[AdapterTensor], n_rows: int, names: dict[str, str]) -> list[Draft]:
    drafts = []
    for (name, role, length), members in by_kind(tensors, names).items():
        n_vectors = min(n_rows, members[0].n_vectors)
        drafts.append(numbered_draft(f"{name}.{role}", members[0].axis, members, n_vectors, length))
    return drafts


def _input_name(module_type: str) -> str:
    """Return the names of the module types that read the same activations as this one."""
    return next(("+".join(names) for names in SAME_INPUT if module_type in names), module_type)


def numbered_draft(name: str, axis: ChunkAxis, members: list[AdapterTensor], n_rows: int, size: int) -> Draft:
    """Number the chunks layer by layer; tensors of one parent module have the same chunks."""
    parents = {p: i for i, p in enumerate(dict.fromkeys(_parent(tensor) for tensor in members))}
    tensors = []
    for tensor in members:
        first = parents[_parent(tensor)] * n_rows
        is_basis = axis == "spectrum" and tensor.axis == "row"
        tensors.append(chunked(tensor, () if is_basis else range(first, first + n_rows)))
    return Draft(name, axis, tuple(tensors), len(parents) * n_rows, size)


def _parent(tensor: AdapterTensor) -> str:
    return tensor.module.rpartition(".")[0]
