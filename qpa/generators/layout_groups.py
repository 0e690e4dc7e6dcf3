"""The groups of chunks of each kind of layout, before it is known which circuits give their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpa.documents import AdapterSpec, AdapterTensor, ChunkedTensor, ChunkGroup, Windows
from qpa.documents.weight_layout import ChunkAxis

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
"""Module types that, in one parent module, read the same activations."""


@dataclass(frozen=True)
class Draft:
    """A group to be: its tensors and chunks, without the places of the chunks among the basis states."""

    name: str
    axis: ChunkAxis
    tensors: tuple[ChunkedTensor, ...]
    n_chunks: int
    chunk_size: int

    def group(self, states: Iterable[int], n_features: int, hidden: tuple[int, ...] = ()) -> ChunkGroup:
        """Return the group with its chunks on these basis states, decoded through these hidden widths."""
        return ChunkGroup(
            name=self.name,
            axis=self.axis,
            tensors=self.tensors,
            states=tuple(states),
            chunk_size=self.chunk_size,
            decoder_widths=(n_features, *hidden, self.chunk_size),
            decoder_bias=self.axis == "flat",
        )


def spectral_drafts(
    spec: AdapterSpec, n_rows: int, spectrum_size: int, vectors: Sequence[str], *, share_inputs: bool
) -> list[Draft]:
    """Return the groups of the spectral layout, each with n_rows chunks a layer.

    Args:    n_rows: generated rows of every lora_A.
             spectrum_size: directions of every spectrum, a multiple of n_rows; 0 for none.
             vectors: module types that have generated rows and columns.
             share_inputs: modules that read the same activations share the rows of their lora_A.
    """
    drafts = []
    pairs = [tensor for pair in spec.pairs for tensor in pair if tensor.module_type in vectors]
    # DoRA's magnitudes are single vectors, and there is no DoRA without them.
    magnitudes = [tensor for tensor in spec.tensors if tensor.role == "lora_magnitude_vector"]
    for (name, role, length), members in _by_kind([*pairs, *magnitudes], share_inputs).items():
        n_vectors = min(n_rows, members[0].n_vectors)
        drafts.append(_draft_of(f"{name}.{role}", members[0].axis, members, n_vectors, length))
    if spectrum_size:
        sides = _by_sides(spec)
        names = [name for name, *_ in sides]
        for (name, n_in, n_out), members in sides.items():
            suffix = f".{n_in}x{n_out}" if names.count(name) > 1 else ""
            size = spectrum_size // n_rows
            drafts.append(_draft_of(f"{name}.spectrum{suffix}", "spectrum", members, n_rows, size))
    return _with_unique_names(drafts)


def aligned_drafts(spec: AdapterSpec) -> list[Draft]:
    """Return one group a module type, role and length, whose chunks are all its rank-1 vectors."""
    drafts = []
    for (name, role, length), members in _by_kind(spec.tensors, share_inputs=False).items():
        chunked, n_chunks = [], 0
        for tensor in members:
            chunked.append(_chunked(tensor, range(n_chunks, n_chunks + tensor.n_vectors)))
            n_chunks += tensor.n_vectors
        drafts.append(Draft(f"{name}.{role}", members[0].axis, tuple(chunked), n_chunks, length))
    return _with_unique_names(drafts)


def flat_draft(spec: AdapterSpec, chunk_size: int) -> Draft:
    """Return the one group of the paper's layout."""
    size = min(chunk_size, spec.n_numbers)
    tensors = tuple(_chunked(tensor, ()) for tensor in spec.tensors)
    return Draft("all", "flat", tensors, -(-spec.n_numbers // size), size)


def windows_of(drafts: Sequence[Draft], n_circuits: int) -> Windows:
    """Return how many qubits number the windows, and the chunks of a group within one."""
    n_inside = max(-(-draft.n_chunks // n_circuits) for draft in drafts)
    return Windows(n_head_qubits=_n_bits(n_circuits), n_layer_qubits=_n_bits(n_inside))


def window_states(
    draft: Draft, n_circuits: int, windows: Windows, group_index: int, n_group_qubits: int
) -> list[int]:
    """Return the basis state of each chunk: bits of its window, of its place there, and of its group."""
    states = []
    for chunk in range(draft.n_chunks):
        window = chunk * n_circuits // draft.n_chunks
        place = chunk - -(-window * draft.n_chunks // n_circuits)
        states.append(((window << windows.n_layer_qubits | place) << n_group_qubits) | group_index)
    return states


def _n_bits(n: int) -> int:
    return (n - 1).bit_length()


def _by_kind(
    tensors: Iterable[AdapterTensor], share_inputs: bool
) -> dict[tuple[str, str, int], list[AdapterTensor]]:
    """Gather tensors by name, role and length of their vectors."""
    members: dict[tuple[str, str, int], list[AdapterTensor]] = {}
    for tensor in tensors:
        is_shared = tensor.role == "lora_A" and share_inputs
        name = _input_name(tensor.module_type) if is_shared else tensor.module_type
        # IA3 scales what some modules get and what others return.
        role = f"{tensor.role}.inputs" if (tensor.role, tensor.axis) == ("ia3_l", "row") else tensor.role
        members.setdefault((name, role, tensor.vector_length), []).append(tensor)
    return members


def _by_sides(spec: AdapterSpec) -> dict[tuple[str, int, int], list[AdapterTensor]]:
    """Gather pairs of lora_A and lora_B by module type and both sides."""
    members: dict[tuple[str, int, int], list[AdapterTensor]] = {}
    for a, b in spec.pairs:
        members.setdefault((a.module_type, a.shape[1], b.shape[0]), []).extend((a, b))
    return members


def _input_name(module_type: str) -> str:
    return next(("+".join(names) for names in SAME_INPUT if module_type in names), module_type)


def _draft_of(name: str, axis: ChunkAxis, members: list[AdapterTensor], n_rows: int, size: int) -> Draft:
    """Number chunks layer by layer; members of one parent module have the same."""
    parents = {p: i for i, p in enumerate(dict.fromkeys(_parent(tensor) for tensor in members))}
    chunked = []
    for tensor in members:
        first = parents[_parent(tensor)] * n_rows
        is_basis = axis == "spectrum" and tensor.axis == "row"
        chunked.append(_chunked(tensor, () if is_basis else range(first, first + n_rows)))
    return Draft(name, axis, tuple(chunked), len(parents) * n_rows, size)


def _parent(tensor: AdapterTensor) -> str:
    return tensor.module.rpartition(".")[0]


def _chunked(tensor: AdapterTensor, chunks: Iterable[int]) -> ChunkedTensor:
    return ChunkedTensor(path=tensor.path, shape=tensor.shape, chunks=tuple(chunks))


def _with_unique_names(drafts: list[Draft]) -> list[Draft]:
    """Tell groups of one name apart by the size of their chunks."""
    names = [draft.name for draft in drafts]
    return [
        draft if names.count(draft.name) == 1 else Draft(f"{draft.name}.{draft.chunk_size}", *_rest(draft))
        for draft in drafts
    ]


def _rest(draft: Draft) -> tuple[ChunkAxis, tuple[ChunkedTensor, ...], int, int]:
    return draft.axis, draft.tensors, draft.n_chunks, draft.chunk_size
