"""The generator of one state: where its directions lie, what it starts as, and its controls."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpa.documents.weight_layout import WITH_CIRCUITS
from qpa.errors import OptionError
from qpa.generators.chunks import basis_shapes
from qpa.generators.features.kind import FEATURES
from qpa.generators.features.log_linear import subsets
from qpa.generators.features.states import register_numbers
from qpa.generators.generator import make_generator
from qpa.generators.state import STATE as STATE_KIND
from qpa.passes.plan_layout import PlanLayout
from qpa.training.optimizer import GeneratedAdapterOptimizer
from tests.small_specs import NOWHERE, small_spec, spec_of

RANK = 4
SPEC = small_spec(3, RANK)
STATE = PlanLayout(generator="state", layers=2)
CONTROLS = tuple(name for name in FEATURES if FEATURES[name].needs_registers and name not in WITH_CIRCUITS)
START = 1.01**0.5 - 0.1
"""Feature of a uniform state: sqrt(1 + eps) - sqrt(eps)."""


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr("qpa.generators.features.circuit.WINDOW_NOISE", 0.0)


def bases_of(layout):
    """Return a basis of distinct vectors for every tensor."""
    random = torch.Generator().manual_seed(7)
    return {path: torch.randn(shape, generator=random) for path, shape in basis_shapes(layout).items()}


def generator_of(plan, spec=SPEC, seed=0):
    layout = plan.run(spec, NOWHERE)
    return make_generator(layout, seed, bases_of(layout))


def features_of(generator):
    return generator.features(generator.run())


def optimizer_of(generator):
    """Return an optimizer on an adapter that holds the initial values, and the adapter."""
    adapter = [torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in generator.layout.tensors]
    return GeneratedAdapterOptimizer(adapter, generator, lr=0.1, angle_lr=0.1), adapter


# Places


def test_every_direction_has_a_basis_state_of_its_layer_type_and_number():
    layout = STATE.run(SPEC, NOWHERE)
    (group,) = layout.groups
    assert layout.features.registers == (2, 3, 2) and layout.ansatz.n_qubits == 7
    types = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    for tensor in (tensor for tensor in group.tensors if tensor.chunks):
        _, number, *_, name = tensor.path.removesuffix(".lora_B.weight").split(".")
        states = [group.states[chunk] for chunk in tensor.chunks]
        expected = [(int(number), types.index(name), direction) for direction in range(RANK)]
        assert list(register_numbers((2, 3, 2), states)) == expected


def test_modules_of_one_name_and_other_sides_are_of_another_type():
    spec = spec_of([("0.attn.c_proj", 8, 8), ("0.mlp.c_proj", 16, 8), ("1.attn.c_proj", 8, 8)], 2)
    layout = STATE.run(spec, NOWHERE)
    assert layout.features.registers == (1, 1, 1)
    assert sorted(layout.groups[0].states) == [0, 1, 2, 3, 4, 5]


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_registers_have_a_state_for_everything_and_no_qubit_too_many(n_layers, n_types, rank):
    sides = {f"m{index}": (8, 8) for index in range(n_types)}
    layout = STATE.run(small_spec(n_layers, rank, sides), NOWHERE)
    expected = tuple(max(1, (n - 1).bit_length()) for n in (n_layers, n_types, rank))
    assert layout.features.registers == expected
    assert layout.n_chunks == n_layers * n_types * rank
    assert layout.account.n_generator == 1 + 2 * sum(expected)


def test_a_model_of_70_billion_takes_15_qubits():
    sides = {name: (64, 64) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    layout = STATE.run(small_spec(80, 32, sides), NOWHERE)
    assert layout.features.registers == (7, 3, 5)
    assert layout.account.n_generator == 31


# What it generates


@pytest.mark.parametrize("features", ["circuit", "signed", *CONTROLS])
def test_nothing_is_changed_before_the_first_step_and_all_alike_by_the_first(no_noise, features):
    plan = replace(STATE, features=features, layers=None)
    generator = generator_of(plan)
    optimizer, adapter = optimizer_of(generator)
    layout, bases = generator.layout, bases_of(generator.layout)
    for tensor, parameter in zip(layout.tensors, adapter, strict=True):
        expected = bases[tensor.path] if tensor.path.endswith("lora_A.weight") else torch.zeros(tensor.shape)
        assert torch.equal(parameter.detach(), expected)
    for tensor, parameter in zip(layout.tensors, adapter, strict=True):
        parameter.grad = bases[tensor.path].clone()
    optimizer.step()
    start = 1.0 if features in CONTROLS else START
    for tensor, parameter in zip(layout.tensors, adapter, strict=True):
        if tensor.path.endswith("lora_B.weight"):
            scale = (parameter.detach() / bases[tensor.path]).flatten()
            torch.testing.assert_close(scale, torch.full_like(scale, -0.1 * start), atol=1e-4, rtol=1e-4)


def test_a_direction_moves_by_the_scale_and_its_own_feature():
    generator = generator_of(STATE)
    layout, bases = generator.layout, bases_of(generator.layout)
    with torch.no_grad():
        generator.decoders[0].weights[0].fill_(3.0)
        generator.chunk_features.angles.uniform_(-3, 3)
    features = features_of(generator)[:, 0]
    tensors = dict(zip([t.path for t in layout.tensors], generator(), strict=True))
    (group,) = layout.groups
    for tensor in (tensor for tensor in group.tensors if tensor.chunks):
        own = features[[group.states[chunk] for chunk in tensor.chunks]]
        torch.testing.assert_close(tensors[tensor.path], bases[tensor.path] * (3.0 * own))


def test_several_circuits_have_a_scale_each():
    generator = generator_of(replace(STATE, circuits=3))
    assert generator.layout.account.n_decoder == 3
    assert features_of(generator).shape == (2**7, 3)


def test_a_sign_qubit_comes_before_the_registers_and_a_feature_is_the_difference_of_its_two_halves():
    plan = replace(STATE, features="signed")
    generator = generator_of(plan)
    layout = generator.layout
    assert layout.features.registers == (1, 2, 3, 2)
    assert layout.account.n_generator == 1 + 2 * 8
    assert layout.groups[0].states == STATE.run(SPEC, NOWHERE).groups[0].states
    with torch.no_grad():
        generator.chunk_features.angles.uniform_(-3, 3, generator=torch.Generator().manual_seed(1))
    probabilities = generator.run()[0]
    roots = torch.sqrt(probabilities * 2**7 + 0.01)
    features = features_of(generator)[:, 0]
    torch.testing.assert_close(features[: 2**7], roots[: 2**7] - roots[2**7 :])
    assert bool((features[: 2**7] < 0).any()) and bool((features[: 2**7] > 0).any())


def test_vectors_are_further_types_of_one_direction_in_the_place_of_the_last_direction():
    layout = replace(STATE, vectors=("q_proj", "k_proj")).run(SPEC, NOWHERE)
    *vectors, directions = layout.groups
    assert [group.name for group in vectors] == [
        "q_proj+k_proj+v_proj.lora_A",
        "q_proj.lora_B",
        "k_proj.lora_B",
    ]
    for number, group in enumerate(vectors):
        found = list(register_numbers(layout.features.registers, group.states))
        assert found == [(layer, 5 + number, 0) for layer in range(3)]
    n_chunks = {t.path.split(".")[-3]: len(t.chunks) for t in directions.tensors if t.chunks}
    assert n_chunks == {"q_proj": 3, "k_proj": 3, "v_proj": 4, "up_proj": 4, "down_proj": 4}
    n_numbers = sum(group.chunk_size for group in vectors)
    assert layout.account.n_decoder == 1 + n_numbers
    generator = generator_of(replace(STATE, vectors=("q_proj", "k_proj")))
    for tensor, generated in zip(layout.tensors, generator(), strict=True):
        if tensor.path.endswith("lora_B.weight"):
            assert not generated.any()


def test_modules_of_one_name_share_vectors_where_their_sides_allow():
    """GPT-2 calls two layers of a block c_proj, so there are more vectors of a kind than layers."""
    spec = spec_of(
        [(f"{layer}.{part}.c_proj", n, 8) for layer in range(3) for part, n in (("attn", 8), ("mlp", 16))], 2
    )
    layout = replace(STATE, vectors=("c_proj",)).run(spec, NOWHERE)
    assert sorted(group.n_chunks for group in layout.groups) == [3, 3, 6, 6]
    assert layout.features.registers == (3, 3, 1)


# Controls


@pytest.mark.parametrize("features", CONTROLS)
@pytest.mark.parametrize("size", [None, 20, 37])
def test_a_control_trains_as_many_numbers_as_the_account_says_and_no_more_than_asked(features, size):
    plan = replace(STATE, features=features, layers=None, control_size=size)
    generator = generator_of(plan)
    n_control = sum(p.numel() for p in generator.chunk_features.parameters())
    assert generator.layout.account.n_control == n_control
    assert generator.layout.account.n_angles == 0
    assert size is None or n_control <= size
    assert torch.equal(features_of(generator), torch.ones(2**7, 1))


@pytest.mark.parametrize("features", sorted({*CONTROLS} - {"constant"}))
def test_a_control_can_tell_directions_apart(features):
    """After steps towards a target that no constant meets, the loss is below the best constant's."""
    generator = generator_of(replace(STATE, features=features, layers=None, control_size=40))
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.03)
    (group,) = generator.layout.groups
    states = list(group.states)
    numbers = torch.tensor(list(register_numbers((2, 3, 2), states)), dtype=torch.float32)
    target = (numbers[:, 1] + 1) * (4 - numbers[:, 2])
    best_constant = float(target.var(unbiased=False))
    for _ in range(300):
        optimizer.zero_grad()
        coefficients = generator.decoders[0](generator.features(None)[states])[:, 0]
        loss = (coefficients - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.9 * best_constant


def test_parities_come_by_their_size_and_then_by_their_width():
    expected = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3), (0, 1, 2)]
    assert list(itertools.islice(subsets(4), 11)) == expected
    assert len(list(subsets(4))) == 15


def test_single_parities_are_a_product_over_the_bits():
    generator = generator_of(replace(STATE, features="log-linear", layers=None, control_size=7))
    weights = torch.linspace(-0.5, 0.5, 7)
    with torch.no_grad():
        generator.chunk_features.weights.copy_(weights)
    for state in (0, 5, 100, 127):
        signs = torch.tensor([1.0 - 2 * int(bit) for bit in f"{state:07b}"])
        expected = torch.exp(weights * signs).prod()
        torch.testing.assert_close(features_of(generator)[state, 0], expected)


def test_own_numbers_go_to_the_first_directions_and_tied_ones_to_equally_many():
    own = generator_of(replace(STATE, features="own", layers=None, control_size=16))
    with torch.no_grad():
        own.chunk_features.numbers.zero_()
    (group,) = own.layout.groups
    features = features_of(own).detach()[list(group.states), 0].view(15, RANK)
    assert torch.equal(features[:, 0], torch.zeros(15)) and float(features[:, 1].sum()) == 14
    assert torch.equal(features[:, 2:], torch.ones(15, 2))
    tied = generator_of(replace(STATE, features="tying", layers=None, control_size=7))
    counts = torch.bincount(tied.chunk_features.places[list(group.states)])
    assert len(counts) == 7 and int(counts.max() - counts.min()) <= 1


def test_shared_numbers_are_the_same_in_all_layers():
    generator = generator_of(replace(STATE, features="shared", layers=None, control_size=10))
    with torch.no_grad():
        generator.chunk_features.numbers.copy_(torch.arange(10.0))
    states = list(generator.layout.groups[0].states)
    features, numbers = features_of(generator).detach()[states, 0], register_numbers((2, 3, 2), states)
    for feature, (_, module_type, direction) in zip(features, numbers, strict=True):
        assert feature == module_type * 2 + direction // 2


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 8}, "chunk_size: expected no chunk size with `generator` state"),
        ({"vectors": ("up",)}, "vectors: expected all, none, or some of .*, found up"),
        ({"qubits": 9}, "qubits: expected 7, those of the registers, found 9"),
        ({"control_size": 9}, "control_size: expected no size of a control"),
        (
            {"features": "tables", "control_size": 3},
            "control_size: expected at least 12 with `features` tables",
        ),
        ({"features": "own", "circuits": 2}, "circuits: expected 1 with `features` own, found 2"),
        ({"features": "magic"}, "features: expected .* found magic"),
        ({"max_params": "50"}, "max_params: expected no `layers`, which it would choose, found 50"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        replace(STATE, **options).run(SPEC, NOWHERE)


@pytest.mark.parametrize("features", CONTROLS)
@pytest.mark.parametrize("generator", ["spectral", "aligned", "paper"])
def test_generators_without_registers_refuse_the_controls_that_read_them(features, generator):
    expected = f"^features: expected circuit, classical, random or bits with `generator` {generator}"
    with pytest.raises(OptionError, match=expected):
        PlanLayout(generator=generator, features=features).run(SPEC, NOWHERE)


@pytest.mark.parametrize(
    "features", ["circuit", "signed", "log-linear", "tables", "network", "tying", "own", "shared"]
)
def test_the_sizes_of_a_budget_grow_and_fit(features):
    plan = replace(STATE, features=features, layers=None)
    n_before = 0
    for budget in (1, 9, 14, 22, 40, 57):
        account = replace(plan, max_params=str(budget)).run(SPEC, NOWHERE).account
        assert n_before <= account.n_generator <= budget
        n_before = account.n_generator
    assert n_before > (20 if features == "shared" else 30)  # of which there are 5 x 4 at most


@pytest.mark.parametrize("features", ["circuit", "signed", "random", "classical", "bits", *CONTROLS])
@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 5}, {"circuits": 3}, {"control_size": 30}, {"vectors": ("q_proj", "down_proj")}],
)
def test_numbers_are_counted_without_a_layout_as_with_one(features, options):
    plan = PlanLayout(generator="state", features=features, **options)
    try:
        expected = plan.run(SPEC, NOWHERE).account.n_generator
    except OptionError as error:
        assert error.subject in ("circuits", "control_size")  # which some features do not have
        return
    assert STATE_KIND.n_trained(plan, SPEC) == expected
