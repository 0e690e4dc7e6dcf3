"""state: one quantum state over all directions in which the loss falls, so that what is trained is angles.

The change of module m's weight is sum_i c[m, i] u_i v_i^T over the singular directions of its gradient. All
coefficients c of a model are read off one state:

    c[m, i] = S f(x),  f(x) = sqrt(p(x) 2**n_qubits + eps) - sqrt(eps)

where p(x) is the probability of the basis state x that stands for the direction, and S, the scale, is the
only number that is trained beside the angles.

Rules:
1. The qubits are three registers: the number of the module among those of its type, which counts the layers;
   the module type, which modules of other sides do not share; the direction, the steepest first. Basis
   states to which nothing belongs carry nothing.
2. The state starts uniform and the scale at 0, so the adapter changes nothing at first, and the first step
   goes down the slope in every direction alike: directions have unit length, as in an orthogonalised step.
3. With several circuits, each has a scale, and their sum is read.
4. Vectors that are no part of a product, such as DoRA's magnitudes, stay as the base model gives them.
5. With the features "signed" one more qubit, before the registers and 0 at the start, tells the sign of c.
6. Module types may have vectors besides, a row of lora_A and a column of lora_B that all layers share, in the
   place of their last direction. A vector is a decoder's weights times a feature, so that the state tells
   each layer's share of it: vectors are further module types with one direction.

From a number of parameters to a size, each rule with its measurement in docs/results.md:
7. One number is the scale alone; further ones are layers of one circuit. This is all where a user names this
   generator. Otherwise the planner takes, at every size, what was better there:
8. Below two layers it is the control "log-linear", which has a size for every number. One layer is a product
   over the bits, as the first weights of this control are, and does no better.
9. From two layers on it is a circuit with a qubit for the sign.
10. From MAX_CIRCUIT numbers on it is the control "tables", whose sizes are a term apart, and from MAX_TABLES
    numbers on own numbers for the first directions of every module.
11. As soon as they fit beside VECTOR_LAYERS layers of a circuit, it is that and vectors on module types that
    write to the residual stream: first on the shorter of two, then on the longer, then on both.

Source: ours; measured in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, final

from qpa.circuits.ansatz import make_ansatz
from qpa.documents import (
    AdapterSpec,
    ChunkedTensor,
    ChunkGroup,
    Provenance,
    WeightLayout,
    Windows,
)
from qpa.documents.weight_layout import OF_TRAINED_CIRCUITS
from qpa.errors import OptionError
from qpa.generators.chunks import Draft, chunked, make_layout, n_qubits_for, with_unique_names
from qpa.generators.features.kind import FEATURES, Room
from qpa.generators.generator import GeneratorKind, L, check_product, refuse_chunk_size
from qpa.generators.layout_options import ALL, LayoutOptions
from qpa.generators.vectors import (
    PairsBySides,
    module_types,
    pairs_by_sides,
    types_that_write,
    vector_drafts,
)

N_LAYERS = 12
MAX_LAYERS = 64
"""The most layers, or random circuits, that a budget buys: no more were measured."""

RATE = 5e-2
ANGLE_RATIO = 2.0

MAX_CIRCUIT = 200
"""The most numbers with which the planner, left to itself, plans a circuit without vectors; see rule 10."""

MAX_TABLES = 600
"""The most numbers with which the planner, left to itself, plans tables; see rule 10."""

MIN_LAYERS = 2
"""The fewest layers with which the planner, left to itself, plans a circuit; see rule 8."""

VECTOR_LAYERS = 5
"""The layers of a circuit that the planner, left to itself, plans with vectors; see rule 11."""


@final
class StateKind(GeneratorKind):
    """The generator of the smallest sizes."""

    name: ClassVar[str] = "state"
    words: ClassVar[str] = "one quantum state over the directions in which the loss falls"
    defaults: ClassVar[Mapping[str, str]] = {"layers": str(N_LAYERS), "circuits": "1", "lr": str(RATE)}
    needs_product: ClassVar[bool] = True
    angle_ratio: ClassVar[float] = ANGLE_RATIO
    nats_per_efold: ClassVar[float] = 0.04
    registers: ClassVar[tuple[str, ...]] = ("layer", "module type", "direction")

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse an adapter that is no product of factors, and options of other generators."""
        check_product(spec, self.name)
        refuse_chunk_size(options, self.name)
        if _vector_types(options, spec) and spec.rank < 2:
            advice = "for a vector and a direction"
            raise OptionError("rank", "at least 2 with `vectors`", str(spec.rank), advice)

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: one group of all directions, and those of vectors, on three registers."""
        places = _Places.of(options, spec)
        sign = (1,) * FEATURES[options.features].n_sign_qubits
        n_qubits, n_circuits = sum((*sign, *places.registers)), options.circuits or 1
        if options.qubits is not None and options.qubits != n_qubits:
            expected = f"{n_qubits}, those of the registers"
            raise OptionError("qubits", expected, str(options.qubits), "leave it out")
        n_qubits_for(options, 2**n_qubits)
        states = places.of_directions()
        directions = Draft("directions", "spectrum", places.tensors(), len(states), 1)
        starts_uniform = options.windows and options.features != "random"
        windows = Windows(n_window_qubits=sum(sign), n_chunk_qubits=sum(places.registers))
        return make_layout(
            self.name,
            options,
            spec,
            provenance,
            (*places.groups_of_vectors(n_circuits), directions.group(states, n_circuits)),
            make_ansatz(options.ansatz, n_qubits, options.layers or N_LAYERS),
            n_circuits,
            windows if starts_uniform else None,
            registers=(*sign, *places.registers),
        )

    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Return the scale alone and circuits of growing depth; or a control of growing size."""
        for name in ("circuits", "layers", "control_size"):
            if getattr(options, name) is not None:
                expected = f"no `{name}`, which it would choose"
                raise OptionError("max_params", expected, str(options.max_params), "leave one out")
        unsized = replace(options, max_params=None)
        scale = replace(unsized, generator=self.name, features="constant")
        if options.features == "random":
            return [replace(unsized, circuits=n) for n in range(1, MAX_LAYERS + 1)]
        if options.features not in OF_TRAINED_CIRCUITS:
            return [scale, *_control_sizes(unsized, spec).values()]
        return [scale, *(replace(unsized, generator=self.name, layers=n) for n in range(1, MAX_LAYERS + 1))]

    def n_trained(self, options: LayoutOptions, spec: AdapterSpec) -> int:
        """Return how many numbers the layout of options trains, without a layout of every direction."""
        self.check(options, spec)
        places, n_circuits = _Places.of(options, spec), options.circuits or 1
        n_decoder = n_circuits * (1 + sum(draft.chunk_size for draft in places.vectors))
        if options.features in OF_TRAINED_CIRCUITS:
            n_qubits = FEATURES[options.features].n_sign_qubits + sum(places.registers)
            ansatz = make_ansatz(options.ansatz, n_qubits, options.layers or N_LAYERS)
            return n_decoder + n_circuits * ansatz.n_angles
        return n_decoder + _n_control(options, places)(options.control_size)

    def size_words(self, options: LayoutOptions) -> str:
        """Return "state, signed, layers 4, vectors o_proj", or for a control "state, own 250"."""
        vectors = "" if ALL in options.vectors else f", vectors {','.join(options.vectors)}"
        if options.features in OF_TRAINED_CIRCUITS:
            signed = "" if options.features == "circuit" else f", {options.features}"
            return f"{self.name}{signed}, layers {options.layers}{vectors}"
        size = "" if options.control_size is None else f" {options.control_size}"
        return f"{self.name}, {options.features}{size}{vectors}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate of the scale that the bench found best; that of the angles is twice as high."""
        return RATE


STATE = StateKind()


def small_sizes(options: L, spec: AdapterSpec, n_below: int) -> list[L]:
    """Return the options of all sizes of fewer than n_below numbers, by growing size, after rules 7 to 11."""
    named = replace(options, generator=STATE.name, features="signed")
    unsized = replace(named, max_params=None)
    scale, *circuits = STATE.sizes(named, spec)
    with_vectors = [
        size
        for size in (
            replace(unsized, layers=VECTOR_LAYERS, vectors=vectors) for vectors in _types_for_vectors(spec)
        )
        if STATE.n_trained(size, spec) < n_below
    ]
    n_end = STATE.n_trained(with_vectors[0], spec) if with_vectors else n_below
    n_qubits = FEATURES["signed"].n_sign_qubits + sum(_Places.of(unsized, spec).registers)
    in_layers = {
        1 + make_ansatz(options.ansatz, n_qubits, size.layers or 0).n_angles: size for size in circuits
    }
    n_two_layers = list(in_layers)[MIN_LAYERS - 1]
    sizes = {1: scale}
    for features, n_rung in (
        ("log-linear", n_two_layers - 1),
        ("signed", MAX_CIRCUIT),
        ("tables", MAX_TABLES),
        ("own", n_end),
    ):
        n_last, n_most = max(sizes), min(n_rung, n_end - 1)
        control = replace(unsized, features=features)
        found = in_layers if features == "signed" else _control_sizes(control, spec, n_most)
        sizes |= {n: size for n, size in found.items() if n_last < n <= n_most}
    return [*sizes.values(), *with_vectors]


def _types_for_vectors(spec: AdapterSpec) -> list[tuple[str, ...]]:
    """Return the module types of rule 11, by growing size; none where a module has one direction only."""
    if spec.rank < 2:
        return []
    writing = types_that_write(spec)[:2]
    return [*((name,) for name in writing), *([tuple(writing)] if len(writing) == 2 else [])]


def _vector_types(options: LayoutOptions, spec: AdapterSpec) -> set[str]:
    """Return the module types that have vectors: those that are named, by default none."""
    return set() if ALL in options.vectors else module_types(options.vectors, spec)


@dataclass(frozen=True)
class _Places:
    """Which basis state stands for which direction or vector.

    Args:    types: pairs of lora_A and lora_B by module type, inputs and outputs.
             n_directions: of the modules of each of these types.
             vectors: the groups of vectors, each of which has a chunk for every layer.
             registers: the qubits that count layers, types and directions.
    """

    types: PairsBySides
    n_directions: tuple[int, ...]
    vectors: tuple[Draft, ...]
    registers: tuple[int, int, int]

    @classmethod
    def of(cls, options: LayoutOptions, spec: AdapterSpec) -> _Places:
        """Return the places of an adapter's directions and vectors."""
        types, chosen = pairs_by_sides(spec), _vector_types(options, spec)
        drafts = vector_drafts(spec, 1, chosen, share_inputs=options.share_inputs) if chosen else []
        n_layers = max(*map(len, types.values()), *(draft.n_chunks for draft in drafts), 1)
        return cls(
            types=types,
            n_directions=tuple(spec.rank - (name in chosen) for name, *_ in types),
            vectors=tuple(with_unique_names(drafts)),
            registers=(_n_qubits(n_layers), _n_qubits(len(types) + len(drafts)), _n_qubits(spec.rank)),
        )

    def of_directions(self) -> list[int]:
        """Return the basis state of every direction, type by type and layer by layer."""
        return [
            self._state(layer, module_type, direction)
            for module_type, (pairs, n) in enumerate(zip(self.types.values(), self.n_directions, strict=True))
            for layer in range(len(pairs))
            for direction in range(n)
        ]

    def tensors(self) -> tuple[ChunkedTensor, ...]:
        """Return the tensors in the order of `of_directions`, with a chunk for every direction."""
        tensors: list[ChunkedTensor] = []
        n_placed = 0
        for pairs, n in zip(self.types.values(), self.n_directions, strict=True):
            for a, b in pairs:
                tensors += (chunked(a, ()), chunked(b, range(n_placed, n_placed + n)))
                n_placed += n
        return tuple(tensors)

    def groups_of_vectors(self, n_circuits: int) -> tuple[ChunkGroup, ...]:
        """Return the groups of vectors; their types come after those of directions."""
        return tuple(
            draft.group([self._state(layer, number, 0) for layer in range(draft.n_chunks)], n_circuits)
            for number, draft in enumerate(self.vectors, len(self.types))
        )

    def _state(self, layer: int, module_type: int, direction: int) -> int:
        _, n_type_qubits, n_direction_qubits = self.registers
        return (layer << n_type_qubits | module_type) << n_direction_qubits | direction


def _n_qubits(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _n_control(options: LayoutOptions, places: _Places) -> Callable[[int | None], int]:
    """Return a function that tells how many numbers a control trains, by the most that it may."""
    groups, states = places.groups_of_vectors(1), places.of_directions()
    states = [*(state for group in groups for state in group.states), *states]
    registers = places.registers
    ansatz = make_ansatz(options.ansatz, sum(registers), 1)
    kind, n_circuits = FEATURES[options.features], options.circuits or 1
    return lambda limit: kind.n_control(Room(n_circuits, None, registers, ansatz, states, limit))


def _control_sizes(options: L, spec: AdapterSpec, n_most: int | None = None) -> dict[int, L]:
    """Return a control's options by how many numbers are trained: every number at first, then 5 % apart."""
    n_control = _n_control(options, _Places.of(options, spec))
    found: dict[int, L] = {}
    limit, n_directions = 1, len(spec.pairs) * spec.rank
    while limit <= min(n_directions, n_most or n_directions):
        # Below the smallest size of a control there is none.
        with suppress(OptionError):
            found.setdefault(1 + n_control(limit), replace(options, control_size=limit))
        limit += max(1, limit // 20)
    return found
