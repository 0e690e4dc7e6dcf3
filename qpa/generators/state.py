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

From a number of parameters to a size, each rule with its measurement in docs/results.md:
6. One number is the scale alone; further ones are layers of one circuit. This is all where a user names this
   generator. Otherwise the planner takes, at every size, what was better there:
7. Below two layers it is the control "log-linear", which has a size for every number. One layer is a product
   over the bits, as the first weights of this control are, and does no better.
8. From two layers on it is a circuit with a qubit for the sign.
9. From MAX_CIRCUIT numbers on it is own numbers for the first directions of every module.

Source: ours; measured in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar, final

from qpa.circuits.ansatz import make_ansatz
from qpa.documents import (
    AdapterSpec,
    AdapterTensor,
    ChunkedTensor,
    Provenance,
    WeightLayout,
    Windows,
)
from qpa.documents.weight_layout import OF_TRAINED_CIRCUITS
from qpa.errors import OptionError
from qpa.generators.chunks import Draft, chunked, make_layout, n_qubits_for
from qpa.generators.features.kind import FEATURES, Room
from qpa.generators.generator import GeneratorKind, L, check_product, refuse_chunk_size
from qpa.generators.layout_options import ALL, LayoutOptions

N_LAYERS = 12
MAX_LAYERS = 64
"""The most layers, or random circuits, that a budget buys: no more were measured."""

RATE = 5e-2
ANGLE_RATIO = 2.0
Types = dict[tuple[str, int, int], list[tuple[AdapterTensor, AdapterTensor]]]
"""Pairs of lora_A and lora_B by module type, inputs and outputs."""

MAX_CIRCUIT = 270
"""The most numbers with which the planner, left to itself, plans a circuit; see rule 9."""

MIN_LAYERS = 2
"""The fewest layers with which the planner, left to itself, plans a circuit; see rule 7."""


@final
class StateKind(GeneratorKind):
    """The generator of the smallest sizes."""

    name: ClassVar[str] = "state"
    words: ClassVar[str] = "one quantum state over the directions in which the loss falls"
    defaults: ClassVar[Mapping[str, str]] = {"layers": str(N_LAYERS), "circuits": "1", "lr": str(RATE)}
    needs_product: ClassVar[bool] = True
    angle_ratio: ClassVar[float] = ANGLE_RATIO
    nats_per_efold: ClassVar[float] = 0.04

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse an adapter that is no product of factors, and options of other generators."""
        check_product(spec, self.name)
        refuse_chunk_size(options, self.name)
        if options.vectors != (ALL,):
            expected = f"no names with `generator` {self.name}, which has no vectors"
            raise OptionError("vectors", expected, ", ".join(options.vectors), "leave it out")

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: one group of all directions, on three registers."""
        types = _by_type(spec)
        registers, tensors = _registers(types, spec.rank), _tensors(types, spec.rank)
        states, sign = _states(types, registers, spec.rank), (1,) * FEATURES[options.features].n_sign_qubits
        n_qubits = sum((*sign, *registers))
        if options.qubits is not None and options.qubits != n_qubits:
            expected = f"{n_qubits}, those of the registers"
            raise OptionError("qubits", expected, str(options.qubits), "leave it out")
        n_qubits_for(options, 2**n_qubits)
        n_circuits = options.circuits or 1
        group = Draft("directions", "spectrum", tensors, len(states), 1).group(states, n_circuits)
        starts_uniform = options.windows and options.features != "random"
        return make_layout(
            self.name,
            options,
            spec,
            provenance,
            (group,),
            make_ansatz(options.ansatz, n_qubits, options.layers or N_LAYERS),
            n_circuits,
            Windows(n_window_qubits=sum(sign), n_chunk_qubits=sum(registers)) if starts_uniform else None,
            registers=(*sign, *registers),
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
            return [scale, *_control_sizes(unsized, spec)]
        return [scale, *(replace(unsized, generator=self.name, layers=n) for n in range(1, MAX_LAYERS + 1))]

    def n_trained(self, options: LayoutOptions, spec: AdapterSpec) -> int:
        """Return how many numbers the layout of options trains, without a layout of every direction."""
        self.check(options, spec)
        n_circuits = options.circuits or 1
        if options.features in OF_TRAINED_CIRCUITS:
            n_qubits = _n_qubits_of(options, spec)
            return n_circuits * (
                1 + make_ansatz(options.ansatz, n_qubits, options.layers or N_LAYERS).n_angles
            )
        return n_circuits + _n_control(options, spec)(options.control_size)

    def size_words(self, options: LayoutOptions) -> str:
        """Return "state, layers 4" or "state, signed, layers 4", or for a control "state, own 250"."""
        if options.features in OF_TRAINED_CIRCUITS:
            signed = "" if options.features == "circuit" else f", {options.features}"
            return f"{self.name}{signed}, layers {options.layers}"
        size = "" if options.control_size is None else f" {options.control_size}"
        return f"{self.name}, {options.features}{size}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate of the scale that the bench found best; that of the angles is twice as high."""
        return RATE


STATE = StateKind()


def small_sizes(options: L, spec: AdapterSpec, n_below: int) -> list[L]:
    """Return the options of all sizes of fewer than n_below numbers, by growing size, after rules 6 to 9."""
    named = replace(options, generator=STATE.name, features="signed")
    scale, *circuits = STATE.sizes(named, spec)
    n_qubits = _n_qubits_of(named, spec)
    n_layers = max(0, min(MAX_CIRCUIT, n_below - 1) - 1) // n_qubits
    n_first = 1 + n_qubits * MIN_LAYERS
    n_last = max(n_first, 1 + n_qubits * n_layers)
    unsized = replace(named, max_params=None)
    products = _control_sizes(replace(unsized, features="log-linear"), spec)
    own = _control_sizes(replace(unsized, features="own"), spec)
    return [
        scale,
        *(size for size in products if 1 + (size.control_size or 0) < min(n_first, n_below)),
        *circuits[MIN_LAYERS - 1 : n_layers],
        *(size for size in own if n_last <= (size.control_size or 0) < n_below - 1),
    ]


def _states(types: Types, registers: tuple[int, int, int], n_directions: int) -> list[int]:
    """Return the basis state of every direction, type by type and layer by layer."""
    _, n_type_qubits, n_direction_qubits = registers
    return [
        (layer << n_type_qubits | type_index) << n_direction_qubits | direction
        for type_index, pairs in enumerate(types.values())
        for layer in range(len(pairs))
        for direction in range(n_directions)
    ]


def _tensors(types: Types, n_directions: int) -> tuple[ChunkedTensor, ...]:
    """Return the tensors in the order of `_states`, with a chunk for every direction."""
    tensors: list[ChunkedTensor] = []
    for index, (a, b) in enumerate(pair for pairs in types.values() for pair in pairs):
        first = index * n_directions
        tensors += (chunked(a, ()), chunked(b, range(first, first + n_directions)))
    return tuple(tensors)


def _by_type(spec: AdapterSpec) -> Types:
    """Gather pairs of lora_A and lora_B by module type and both sides."""
    types: Types = {}
    for a, b in spec.pairs:
        types.setdefault((a.module_type, a.shape[1], b.shape[0]), []).append((a, b))
    return types


def _registers(types: Types, n_directions: int) -> tuple[int, int, int]:
    n_layers = max(len(pairs) for pairs in types.values())
    return _n_qubits(n_layers), _n_qubits(len(types)), _n_qubits(n_directions)


def _n_qubits_of(options: LayoutOptions, spec: AdapterSpec) -> int:
    return FEATURES[options.features].n_sign_qubits + sum(_registers(_by_type(spec), spec.rank))


def _n_qubits(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _n_control(options: LayoutOptions, spec: AdapterSpec) -> Callable[[int | None], int]:
    """Return a function that tells how many numbers a control trains, by the most that it may."""
    types = _by_type(spec)
    registers = _registers(types, spec.rank)
    states, ansatz = _states(types, registers, spec.rank), make_ansatz(options.ansatz, sum(registers), 1)
    kind, n_circuits = FEATURES[options.features], options.circuits or 1
    return lambda limit: kind.n_control(Room(n_circuits, None, registers, ansatz, states, limit))


def _control_sizes(options: L, spec: AdapterSpec) -> list[L]:
    """Return a control's options of growing size, each size once: every number at first, then 5 % apart."""
    n_control = _n_control(options, spec)
    found: dict[int, L] = {}
    limit, n_directions = 1, len(spec.pairs) * spec.rank
    while limit <= n_directions:
        # Below the smallest size of a control there is none.
        with suppress(OptionError):
            found.setdefault(n_control(limit), replace(options, control_size=limit))
        limit += max(1, limit // 20)
    return list(found.values())
