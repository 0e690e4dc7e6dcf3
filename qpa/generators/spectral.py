"""spectral: vectors shared over windows of neighbouring layers, and factors of the gradient's directions.

Rules:
1. A chunk is a rank-1 vector, a row of lora_A or a column of lora_B, or the factors of some of the gradient's
   singular directions (a "spectrum"), which take what the vectors leave of the rank.
2. Chunks of one kind and length form a group over all layers and share one decoder, a linear map without
   bias; modules that read the same activations share the rows of their lora_A.
3. Circuit k starts on the k-th window of neighbouring layers, so with one circuit for each layer the vectors
   are those of LoRA of rank 1. A vector that is no part of a product, such as DoRA's magnitudes, is one chunk
   for each module.
4. A basis state's bits number its window, the chunk's place within the window, and its group.

From a number of parameters to circuits and vectors, each rule with its measurement in docs/results.md:
5. Every module keeps its spectrum: it is a few numbers that all layers share, and no others gain as much.
6. Vectors on every module type come before a second circuit.
7. As many circuits as the budget allows are best. Above one for each layer, one more for each layer is taken
   at a time, since a window is then one row of one layer.
8. Where not even one circuit fits with all vectors, the longest vectors are left out first; where not even
   the N_TYPES shortest fit, the generator of one state takes over (`qpa.generators.state`).

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, final

from qpa.circuits.ansatz import make_ansatz
from qpa.documents import AdapterSpec, Provenance, WeightLayout, Windows
from qpa.errors import OptionError
from qpa.generators.chunks import (
    Draft,
    make_layout,
    n_qubits_for,
    with_unique_names,
)
from qpa.generators.generator import (
    GeneratorKind,
    L,
    check_product,
    refuse_budget,
    refuse_chunk_size,
)
from qpa.generators.layout_options import ALL, NONE, LayoutOptions
from qpa.generators.state import small_sizes
from qpa.generators.vectors import (
    drafts_alone,
    module_types,
    numbered_draft,
    pairs_by_sides,
    types_by_length,
    vector_drafts,
)

N_LAYERS = 1
RATE = 2e-2

N_TYPES = 4
"""The fewest module types with vectors with which the planner, left to itself, plans this generator."""


@final
class SpectralKind(GeneratorKind):
    """The default generator of adapters that are products of two factors."""

    name: ClassVar[str] = "spectral"
    needs_product: ClassVar[bool] = True
    words: ClassVar[str] = (
        "vectors shared by neighbouring layers, and factors of the directions in which the loss falls"
    )
    defaults: ClassVar[Mapping[str, str]] = {
        "layers": str(N_LAYERS),
        "circuits": "one for each layer of the model",
        "lr": str(RATE),
    }

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse an adapter that is no product of factors, and a chunk size."""
        check_product(spec, self.name)
        refuse_chunk_size(options, self.name)

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: groups of vectors and spectra, on windows."""
        n_circuits = options.circuits or spec.n_layers
        drafts = _drafts(options, spec, n_circuits)
        windows = _windows(drafts, n_circuits)
        n_used = windows.n_window_qubits + windows.n_chunk_qubits
        n_qubits = n_qubits_for(options, len(drafts) * 2**n_used)
        groups = tuple(
            draft.group(_states(draft, n_circuits, windows, index, n_qubits - n_used), n_circuits)
            for index, draft in enumerate(drafts)
        )
        starts_on_windows = windows if options.windows else None
        n_layers = options.layers or N_LAYERS
        ansatz = make_ansatz(options.ansatz, n_qubits, n_layers)
        return make_layout(
            self.name, options, spec, provenance, groups, ansatz, n_circuits, starts_on_windows
        )

    def sizes(self, options: L, spec: AdapterSpec) -> list[L]:
        """Return the options that rules 5 to 8 consider."""
        if options.circuits is not None or options.vectors != (ALL,):
            raise refuse_budget(options)
        types = types_by_length(spec)
        chosen = [
            tuple(types[:n_types]) or (NONE,) for n_types in range(len(types) if options.spectrum else 0)
        ]
        n_layers = spec.n_layers
        n_circuits = [*range(1, n_layers + 1), *range(2 * n_layers, n_layers * spec.rank, n_layers)]
        unsized = replace(options, max_params=None)
        return [replace(unsized, circuits=1, vectors=vectors) for vectors in chosen] + [
            replace(unsized, circuits=n) for n in n_circuits
        ]

    def smaller(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Return sizes of one state up to one circuit with vectors on the N_TYPES shortest module types.

        Where the user names this generator, or a part that only this one has, there are none.
        """
        is_whole = options.spectrum and options.windows and options.share_inputs
        if options.generator is not None or options.features != "circuit" or not is_whole:
            return ()
        one = replace(options, circuits=1, vectors=tuple(types_by_length(spec)[:N_TYPES]), max_params=None)
        return small_sizes(options, spec, self.plan(one, spec, spec.provenance).account.n_generator)

    def size_words(self, options: LayoutOptions) -> str:
        """Return "circuits 4", or with vectors on some layers alone "circuits 1, vectors k_proj,v_proj"."""
        vectors = "" if ALL in options.vectors else f", vectors {','.join(options.vectors)}"
        return f"circuits {options.circuits}{vectors}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate the bench found best at every size."""
        return RATE


SPECTRAL = SpectralKind()


def _drafts(options: LayoutOptions, spec: AdapterSpec, n_circuits: int) -> list[Draft]:
    """Return drafts of the groups, each with as many chunks per layer as there are circuits per layer."""
    n_rows = -(-n_circuits // spec.n_layers)
    largest = spec.rank - options.spectrum
    if not largest:
        advice = "or use `generator` aligned"
        raise OptionError("rank", "at least 2, for a vector and a spectrum", str(spec.rank), advice)
    if n_rows > largest:
        expected = f"at most {largest * spec.n_layers}, {largest} for each layer with rank {spec.rank}"
        raise OptionError("circuits", expected, str(n_circuits), "lower it or raise `rank`")
    types, chosen = module_types((ALL,), spec), module_types(options.vectors, spec)
    n_left = spec.rank - (n_rows if chosen else 0)
    spectrum_size = n_left // n_rows * n_rows if options.spectrum else 0
    if chosen != types and not spectrum_size:
        advice = "name all layers, lower `circuits` or raise `rank`"
        raise OptionError("vectors", "vectors or a spectrum on every layer", "neither on some", advice)
    vectors = vector_drafts(spec, n_rows, chosen, share_inputs=options.share_inputs)
    vectors += drafts_alone(spec, n_rows)
    return with_unique_names(vectors + _spectrum_drafts(spec, n_rows, spectrum_size))


def _spectrum_drafts(spec: AdapterSpec, n_rows: int, spectrum_size: int) -> list[Draft]:
    """Return a group of factors for every module type and its sides.

    Args:    spectrum_size: directions of every spectrum, a multiple of n_rows; 0 for none.
    """
    if not spectrum_size:
        return []
    drafts, sides = [], pairs_by_sides(spec)
    names = [name for name, *_ in sides]
    for (name, n_in, n_out), pairs in sides.items():
        members = [tensor for pair in pairs for tensor in pair]
        suffix = f".{n_in}x{n_out}" if names.count(name) > 1 else ""
        drafts.append(
            numbered_draft(f"{name}.spectrum{suffix}", "spectrum", members, n_rows, spectrum_size // n_rows)
        )
    return drafts


def _windows(drafts: Sequence[Draft], n_circuits: int) -> Windows:
    """Return how many qubits number the windows, and the chunks of a group within one."""
    n_inside = max(-(-draft.n_chunks // n_circuits) for draft in drafts)
    return Windows(n_window_qubits=_n_bits(n_circuits), n_chunk_qubits=_n_bits(n_inside))


def _states(
    draft: Draft, n_circuits: int, windows: Windows, group_index: int, n_group_qubits: int
) -> list[int]:
    """Return the basis state of each chunk: bits of its window, of its place there, and of its group."""
    states = []
    for chunk in range(draft.n_chunks):
        window = chunk * n_circuits // draft.n_chunks
        place = chunk - -(-window * draft.n_chunks // n_circuits)
        states.append(((window << windows.n_chunk_qubits | place) << n_group_qubits) | group_index)
    return states


def _n_bits(n: int) -> int:
    return (n - 1).bit_length()
