"""Groups of chunks: how the kinds of generators lay out the vectors of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qpa.documents import (
    MAX_QUBITS,
    AdapterSpec,
    AdapterTensor,
    Ansatz,
    ChunkedTensor,
    ChunkGroup,
    Contexts,
    Decoder,
    Features,
    Provenance,
    TensorShape,
    WeightLayout,
    Windows,
    account_of,
)
from qpa.documents.weight_layout import WITH_CIRCUITS, ChunkAxis
from qpa.errors import OptionError, one_of
from qpa.generators.features.kind import FEATURES, Room
from qpa.generators.layout_options import LayoutOptions


@dataclass(frozen=True)
class Draft:
    """A planned group: its tensors and chunks, which have no places among the basis states yet."""

    name: str
    axis: ChunkAxis
    tensors: tuple[ChunkedTensor, ...]
    n_chunks: int
    chunk_size: int

    def group(self, states: Iterable[int], n_features: int, hidden: tuple[int, ...] = ()) -> ChunkGroup:
        """Return the group with its chunks on these basis states, decoded through these hidden widths."""
        widths = (n_features, *hidden, self.chunk_size)
        return ChunkGroup(
            name=self.name,
            axis=self.axis,
            tensors=self.tensors,
            states=tuple(states),
            chunk_size=self.chunk_size,
            decoder=Decoder(kind="linear", widths=widths, has_bias=self.axis == "flat"),
        )


def by_kind(
    tensors: Iterable[AdapterTensor], names: Mapping[str, str] | None = None
) -> dict[tuple[str, str, int], list[AdapterTensor]]:
    """Gather tensors by name, role and length of their vectors.

    Args:    names: the names, by path, of tensors that are not gathered by their module type.
    """
    members: dict[tuple[str, str, int], list[AdapterTensor]] = {}
    for tensor in tensors:
        name = (names or {}).get(tensor.path, tensor.module_type)
        # IA3 scales what some modules get and what others return.
        role = f"{tensor.role}.inputs" if (tensor.role, tensor.axis) == ("ia3_l", "row") else tensor.role
        members.setdefault((name, role, tensor.vector_length), []).append(tensor)
    return members


def chunked(tensor: AdapterTensor, chunks: Iterable[int]) -> ChunkedTensor:
    """Return a tensor that these chunks of its group fill."""
    return ChunkedTensor(path=tensor.path, shape=tensor.shape, chunks=tuple(chunks))


def with_unique_names(drafts: list[Draft]) -> list[Draft]:
    """Tell groups of one name apart by the size of their chunks."""
    names = [draft.name for draft in drafts]
    return [
        draft if names.count(draft.name) == 1 else replace(draft, name=f"{draft.name}.{draft.chunk_size}")
        for draft in drafts
    ]


def make_layout(
    generator: str,
    options: LayoutOptions,
    spec: AdapterSpec,
    provenance: Provenance,
    groups: tuple[ChunkGroup, ...],
    ansatz: Ansatz,
    n_circuits: int,
    windows: Windows | None = None,
    *,
    registers: tuple[int, ...] = (),
    has_index_bits: bool = False,
) -> WeightLayout:
    """Return the layout of groups, with its account.

    Raises:  OptionError: there are no such features, or not with this generator, or not of this size.
    """
    states = [state for group in groups for state in group.states]
    room = Room(n_circuits, windows, registers, ansatz, states, options.control_size)
    features = Features(
        kind=options.features,
        n_circuits=n_circuits,
        windows=windows,
        registers=registers,
        has_index_bits=has_index_bits,
        n_control=_n_control(options.features, room, generator),
        contexts=_contexts(options),
    )
    if features.contexts and not features.n_angles(ansatz) + features.n_control:
        raise OptionError("features", "a kind that trains what `contexts` could program", features.kind)
    filled = {tensor.path for group in groups for tensor in group.tensors}
    kept = tuple(TensorShape(path=t.path, shape=t.shape) for t in spec.tensors if t.path not in filled)
    return WeightLayout(
        provenance=provenance,
        generator=generator,
        features=features,
        ansatz=ansatz,
        groups=groups,
        parametrized=(),
        kept=kept,
        account=account_of(features, ansatz, groups, (), kept),
        seed=spec.seed,
        budget=None,
        sizes=(),
    )


def _n_control(features: str, room: Room, generator: str) -> int:
    kind = FEATURES[features]
    if kind.needs_registers and not room.registers:
        usable = [name for name in FEATURES if not FEATURES[name].needs_registers]
        raise OptionError("features", f"{one_of(usable)} with `generator` {generator}", features)
    if kind.needs_registers and room.n_circuits > 1:
        raise OptionError("circuits", f"1 with `features` {features}", str(room.n_circuits))
    if features in WITH_CIRCUITS and room.limit is not None:
        expected = "no size of a control, since the circuits' size is that of their layers"
        raise OptionError("control_size", expected, str(room.limit))
    return kind.n_control(room)


def _contexts(options: LayoutOptions) -> Contexts | None:
    """Return the contexts that options ask for.

    Raises:  OptionError: there are fewer than two, or two of one name.
    """
    names = options.contexts
    if names is None:
        return None
    if len(names) < 2 or len(set(names)) < len(names):
        raise OptionError("contexts", "at least two names, each once", ",".join(names) or "none")
    return Contexts(kind=options.context_kind, names=names, size=options.context_size)


def n_qubits_for(options: LayoutOptions, n_states: int) -> int:
    """Return the number of qubits that was asked for, or the smallest that has so many basis states.

    Raises:  OptionError: the number that was asked for has fewer, or none that can be simulated has enough.
    """
    needed = max(1, (n_states - 1).bit_length())
    if options.qubits is not None and options.qubits < needed:
        raise OptionError("qubits", f"at least {needed} for {n_states} chunks", str(options.qubits))
    chosen = options.qubits or needed
    if chosen > MAX_QUBITS:
        advice = "use a larger `chunk_size`"
        if options.qubits:
            advice = "simulation needs memory for 2**qubits states"
        raise OptionError("qubits", f"at most {MAX_QUBITS}", str(chosen), advice)
    return chosen


def check_vectors(spec: AdapterSpec) -> None:
    """Check that there are basis states for all vectors of an adapter, before a chunk is made of each.

    Raises:  OptionError: there are too few.
    """
    n_vectors = sum(tensor.n_vectors for tensor in spec.tensors)
    if n_vectors > 2**MAX_QUBITS:
        expected = f"at most 2**{MAX_QUBITS} vectors, as many as there are basis states"
        raise OptionError("rank", expected, f"{n_vectors:,}", "lower it")


def basis_shapes(layout: WeightLayout) -> dict[str, tuple[int, int]]:
    """Return the shapes of the bases of a layout's spectra, by the path of the tensor that holds them."""
    shapes: dict[str, tuple[int, int]] = {}
    for group in (group for group in layout.groups if group.axis == "spectrum"):
        for a, b in zip(group.tensors[::2], group.tensors[1::2], strict=True):
            n = group.chunk_size * len(b.chunks)
            shapes |= {a.path: (n, a.shape[1]), b.path: (b.shape[0], n)}
    return shapes


def basis_names(layout: WeightLayout) -> dict[str, str]:
    """Return under which names a generator's arrays hold the bases of its spectra, by path."""
    return {path: f"basis_{index}" for index, path in enumerate(basis_shapes(layout))}


def kept_rows(layout: WeightLayout) -> dict[str, int]:
    """Return, for each tensor that does not start as it is, how many of its rows keep their initial values.

    These are the tensors that hold a basis, and those whose parametrization takes the initial value's place.
    """
    with_basis = {t.path for g in layout.groups if g.axis == "spectrum" for t in g.tensors if not t.chunks}
    rows = dict.fromkeys(sorted(with_basis), 0)
    rows |= {t.path: len(t.chunks) for g in layout.groups if g.axis == "row" for t in g.tensors}
    replaced = {tensor.path: 0 for tensor in layout.parametrized if tensor.replaces_initial}
    return {path: n for path, n in rows.items() if path in with_basis} | replaced
