"""The generator of one state with one thing changed, as methods of the bench.

f is the feature of a basis state, which the scale S multiplies. The unchanged generator is the method `state`
of `qpa bench`, and that with one more qubit for the sign is `state:signed`. Each method here is called
`variant:` and one of these:

    amplitude         f is the amplitude itself, which is real and may be negative
    two-bases         the state is measured in the basis Y as well, and the second f has a trained weight
    within            CNOTs join only qubits of one register: the registers' circuits are multiplied
    across            CNOTs join only the last qubit of a register and the first of the next
    added             each register has a circuit of its own, and their features are added
    reversed          the chain of CNOTs goes from the last qubit to the first
    bricks            layers in turn have every other pair of the chain, and the pairs between
    grown             layers are opened one by one over the first three quarters of the training: the old
                      angles are kept, and a new layer, which changes nothing yet, goes before them
    fitted            the angles start at a least squares fit of what ten free steps give as coefficients
    with-own          a fifth of the numbers are angles, the rest is added to the first directions' features
    first-8           only the first eight directions of a module are in the state; the others have f = 1
    circuits-3        three circuits, each with a scale
    rank-16, rank-64  16 or 64 directions of a module instead of 32; all modules need a side as long as that

`vectors:circuit`, `vectors:own` and so on are the generator, or a control in the circuit's place, with
vectors on the module type VECTOR_TYPE. `vectors:signed` is what `qpa plan` takes at about 300 numbers.

    python -m benchmarks.state_variants --model <stories260K> --data <tinyshakespeare input.txt> \\
        --budgets 130,265 --out docs/results/variants
    qpa bench --report --out docs/results/variants --beside docs/results/few
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.own_methods import parser_of, run
from qpa.bench.generated import STATE_RATES, Generated, sized_plans, state_method
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.bench.trial import batches
from qpa.circuits.execution import Execution
from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.features.circuit import WINDOW_NOISE, root_in_window
from qpa.generators.features.kind import FEATURES, FeatureKind, Room, WithoutCircuits
from qpa.generators.features.states import random_of
from qpa.generators.features.tied import OWN
from qpa.generators.generator import layout_of
from qpa.generators.layout_options import LayoutOptions
from qpa.training.evaluation import causal_loss
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.plain_step import take_step

Pair = tuple[int, int]
Registers = tuple[int, ...]
N_FREE_STEPS, FREE_RATE = 10, 0.05
N_FIT_STEPS, FIT_RATE = 400, 0.03
OWN_SHARE = 0.8
N_FIRST_QUBITS = 3
OPENED_BY = 0.75
VECTOR_TYPE = "down_proj"
FEATURES_WITH_VECTORS = ("circuit", "signed", "own", "tables", "log-linear", "tying", "constant")


def amplitudes(angles: Tensor, permutations: Sequence[Tensor]) -> Tensor:
    """Return the amplitudes float[2**n_qubits] after layers of RY, each followed by a permutation.

    Args:    angles: float[n_layers, n_qubits], radians.
             permutations: int64[2**n_qubits]: layer l gathers with number l modulo their number.
    """
    n_layers, n_qubits = angles.shape
    state = angles.new_zeros(2**n_qubits)
    state[0] = 1
    cos, sin = torch.cos(angles / 2), torch.sin(angles / 2)
    for layer in range(n_layers):
        for qubit in range(n_qubits):
            zero, one = state.view(2**qubit, 2, -1).unbind(1)
            c, s = cos[layer, qubit], sin[layer, qubit]
            state = torch.stack((c * zero - s * one, s * zero + c * one), 1).flatten()
        state = state[permutations[layer % len(permutations)]]
    return state


def in_basis_y(state: Tensor, n_qubits: int) -> Tensor:
    """Return the probabilities float[2**n_qubits] of a measurement of every qubit in the basis Y."""
    turned = state.to(torch.complex64)
    for qubit in range(n_qubits):
        zero, one = turned.view(2**qubit, 2, -1).unbind(1)
        turned = torch.stack((zero - 1j * one, zero + 1j * one), 1).flatten() / math.sqrt(2)
    return turned.abs() ** 2


def permutation_of(pairs: Iterable[Pair], n_qubits: int) -> Tensor:
    """Return the gather int64[2**n_qubits] of CNOTs, given as pairs of control and target in their order."""
    index = torch.arange(2**n_qubits)
    for control, target in reversed(list(pairs)):
        index = index ^ ((index >> (n_qubits - 1 - control)) & 1) << (n_qubits - 1 - target)
    return index


def chain(registers: Registers) -> list[list[Pair]]:
    """Return the pairs of a chain through all qubits."""
    return [[(qubit, qubit + 1) for qubit in range(sum(registers) - 1)]]


def within(registers: Registers) -> list[list[Pair]]:
    """Return the pairs of the chain that join qubits of one register."""
    return [[pair for pair in chain(registers)[0] if pair not in across(registers)[0]]]


def across(registers: Registers) -> list[list[Pair]]:
    """Return the pairs of the chain that join two registers."""
    ends = [sum(registers[: count + 1]) for count in range(len(registers) - 1)]
    return [[(end - 1, end) for end in ends]]


def backwards(registers: Registers) -> list[list[Pair]]:
    """Return the chain from the last qubit to the first."""
    return [chain(registers)[0][::-1]]


def bricks(registers: Registers) -> list[list[Pair]]:
    """Return every other pair of the chain, and the pairs between, for layers in turn."""
    return [chain(registers)[0][::2], chain(registers)[0][1::2]]


@dataclass(frozen=True, eq=False)
class Variant(FeatureKind):
    """Features of one state with one thing changed.

    Args:    name: of the variant, as a kind of features.
             pairs: the CNOTs of layers in turn, by the registers.
             is_amplitude, has_two_bases, is_added: see the module.
             n_opening_steps: steps after which all layers are trained; 0 for from the start.
             own_share: the share of numbers that are no angles.
             n_direction_qubits: of the register of directions; None for one that holds all.
    """

    name: str  # type: ignore[misc]
    pairs: Callable[[Registers], list[list[Pair]]] = chain
    is_amplitude: bool = False
    has_two_bases: bool = False
    is_added: bool = False
    n_opening_steps: int = 0
    own_share: float = 0.0
    n_direction_qubits: int | None = None
    needs_registers = True

    def registers(self, registers: Registers) -> Registers:
        """Return the circuit's registers."""
        *others, n_direction = registers
        return (*others, self.n_direction_qubits or n_direction)

    def n_control(self, room: Room) -> int:
        """Return whole layers of angles, and what else is trained."""
        n_qubits = sum(self.registers(room.registers))
        limit = self.within(room, n_qubits + self.has_two_bases, 12 * n_qubits)
        if self.own_share:
            return limit
        return limit // n_qubits * n_qubits + self.has_two_bases

    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> VariantFeatures:
        """Return the features of a layout."""
        return VariantFeatures(self, layout, seed)


class VariantFeatures(WithoutCircuits, nn.Module):
    """Angles float32[n_layers, n_qubits] and `extra` numbers, to features float[2**n_qubits, 1]."""

    def __init__(self, kind: Variant, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        self.kind, self.registers = kind, kind.registers(layout.features.registers)
        self.n_qubits = n_qubits = sum(self.registers)
        n_layers = max(1, round((1 - kind.own_share) * layout.features.n_control / n_qubits))
        self.permutations = [permutation_of(pairs, n_qubits) for pairs in kind.pairs(self.registers)]
        angles = WINDOW_NOISE * torch.randn((n_layers, n_qubits), generator=random_of(seed))
        angles[-1] += math.pi / 2
        self.angles = nn.Parameter(angles)
        self.extra = nn.Parameter(torch.zeros(layout.features.n_control - angles.numel()))
        self.places = _places_of_own(layout, seed, len(self.extra))
        self.states = _states_of(layout, self.registers[-1])
        self.n_backward = 0
        if kind.n_opening_steps:
            self.angles.register_hook(self._open_layers)  # type: ignore[no-untyped-call]

    def forward(self, probabilities: None) -> Tensor:
        """Return float[2**n_qubits, 1]."""
        feature = self._feature()
        if self.kind.n_direction_qubits:
            feature = torch.cat((feature, feature.new_ones(1)))[self.states]
        if self.kind.own_share:
            feature = feature + torch.cat((self.extra, self.extra.new_zeros(1)))[self.places]
        return feature[:, None]

    def _feature(self) -> Tensor:
        kind, n_qubits = self.kind, self.n_qubits
        if kind.is_added:
            return self._sum_over_registers()
        state = amplitudes(self.angles, self.permutations)
        if kind.is_amplitude:
            return state * 2 ** (n_qubits / 2)
        feature = root_in_window(state**2, 2**n_qubits)
        if kind.has_two_bases:
            feature = feature + self.extra * root_in_window(in_basis_y(state, n_qubits), 2**n_qubits)
        return feature

    def _sum_over_registers(self) -> Tensor:
        parts = torch.split(self.angles, list(self.registers), dim=1)
        features = [
            root_in_window(amplitudes(part, [permutation_of(chain((n,))[0], n)]) ** 2, 2**n)
            for part, n in zip(parts, self.registers, strict=True)
        ]
        layer, module_type, direction = features
        return (layer[:, None, None] + module_type[:, None] + direction - 2).flatten()

    def _open_layers(self, gradient: Tensor) -> Tensor:
        """Return the gradient without that of the layers that are not open yet, which so stay at 0."""
        n_layers, self.n_backward = len(gradient), self.n_backward + 1
        n_open = 1 + self.n_backward * n_layers // self.kind.n_opening_steps
        n_closed = n_layers - min(n_layers, n_open)
        return gradient.masked_fill(torch.arange(n_layers, device=gradient.device)[:, None] < n_closed, 0)


def _places_of_own(layout: WeightLayout, seed: int, n_numbers: int) -> Tensor:
    """Return the place int64[2**n_qubits] of each state's own number; n_numbers where it has none."""
    features = layout.features.model_copy(update={"n_control": n_numbers})
    return OWN.places(layout.model_copy(update={"features": features}), seed)


def _states_of(layout: WeightLayout, n_direction_qubits: int) -> Tensor:
    """Return each state's place among those of fewer directions; one past all for a further direction."""
    n_layer, n_type, n_direction = layout.features.registers
    state = torch.arange(2**layout.ansatz.n_qubits)
    module, direction = state >> n_direction, state & (2**n_direction - 1)
    smaller = module << n_direction_qubits | direction
    past = 2 ** (n_layer + n_type + n_direction_qubits)
    return torch.where(direction < 2**n_direction_qubits, smaller, past)


@dataclass(frozen=True)
class Fitted(Generated):
    """The generator whose angles start at a fit of the coefficients after a few free steps."""

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Take free steps, fit the angles to what they give, and leave the scale at zero."""
        target = _free_features(base, seed)
        attached = super().attach(base, configuration, rate=rate, seed=seed)
        optimizer = cast(GeneratedAdapterOptimizer, attached.optimizer)
        generator: Any = optimizer.generator
        states = torch.tensor(generator.layout.states)
        fit = torch.optim.Adam([generator.chunk_features.angles], lr=FIT_RATE)
        for _ in range(N_FIT_STEPS):
            found = generator.features(generator.run())[states, 0]
            fit.zero_grad()
            torch.autograd.backward(1 - nn.functional.cosine_similarity(found, target, dim=0))
            fit.step()
        generator.zero_grad()
        optimizer.push_forward()
        return attached


def _free_features(base: BenchBase, seed: int) -> Tensor:
    """Return the coefficients float[n_directions] that a few steps with a number for each give."""
    free = state_method("own")
    spec = base.inspect(None)
    n_directions = len(spec.pairs) * spec.rank
    configuration = Configuration("free", (("control_size", n_directions),), n_directions + 1)
    attached = free.attach(base, configuration, rate=FREE_RATE, seed=seed)
    for rows in batches(base.train_rows, 8, N_FREE_STEPS, seed):
        take_step(attached.optimizer, causal_loss(attached.model, rows, rows, bf16=base.bf16))
    generator: Any = cast(GeneratedAdapterOptimizer, attached.optimizer).generator
    states = torch.tensor(generator.layout.states)
    coefficients: Tensor = generator.features(None)[states, 0].detach()
    # The scale tells which way is downhill; its sign is the same for all.
    return coefficients.clamp(min=0)


@dataclass(frozen=True)
class MoreDirections(Generated):
    """The generator on 64 directions of every module."""

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return the sizes of the adapter of rank 64."""
        return super().sizes(_of_rank_64(base), budgets)

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Attach an adapter of rank 64."""
        return super().attach(_of_rank_64(base), configuration, rate=rate, seed=seed)


def _of_rank_64(base: BenchBase) -> BenchBase:
    return replace(base, inspect=lambda rank, method: base.inspect(64, method))


def _three_circuits(plan: LayoutOptions, spec: AdapterSpec, budget: int) -> list[LayoutOptions]:
    """Return the numbers of layers of three circuits below and above the budget."""
    n_qubits = layout_of(plan, spec, spec.provenance).ansatz.n_qubits
    n_layers = max(1, (budget // 3 - 1) // n_qubits)
    return [replace(plan, circuits=3, layers=n) for n in (n_layers, n_layers + 1)]


VARIANTS = (
    Variant("amplitude", is_amplitude=True),
    Variant("two-bases", has_two_bases=True),
    Variant("within", pairs=within),
    Variant("across", pairs=across),
    Variant("added", is_added=True),
    Variant("reversed", pairs=backwards),
    Variant("bricks", pairs=bricks),
    Variant("with-own", own_share=OWN_SHARE),
    Variant("first-8", n_direction_qubits=N_FIRST_QUBITS),
)


def methods(n_steps: int) -> dict[str, Generated]:
    """Register the variants' features, and return the variants as methods for trainings of n_steps."""
    variants = (*VARIANTS, Variant("grown", n_opening_steps=round(OPENED_BY * n_steps)))
    for variant in variants:
        if variant.name not in FEATURES:
            FEATURES.add(variant.name, variant)
    state = LayoutOptions(generator="state")
    found = [replace(state_method(variant.name), name=f"variant:{variant.name}") for variant in variants]
    found += [
        Fitted("variant:fitted", state, sized_plans, STATE_RATES),
        Generated("variant:circuits-3", state, _three_circuits, STATE_RATES),
        Generated("variant:rank-16", state, sized_plans, STATE_RATES, rank=16),
        MoreDirections("variant:rank-64", state, sized_plans, STATE_RATES),
    ]
    found += [
        Generated(
            f"vectors:{features}",
            LayoutOptions(generator="state", features=features, vectors=(VECTOR_TYPE,)),
            sized_plans,
            STATE_RATES,
        )
        for features in FEATURES_WITH_VECTORS
    ]
    return {method.name: method for method in found}


def main() -> None:
    """Compare the variants."""
    options = parser_of("Compare the generator of one state with one thing changed.").parse_args()
    run(methods(options.max_steps), options)


if __name__ == "__main__":
    main()
