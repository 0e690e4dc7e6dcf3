import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qpa.adapters.initial_values import initial_value
from qpa.circuits.ry_cnot_chain import RyCnotChain
from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import ShapeError
from qpa.generators.chunks import basis_shapes
from qpa.generators.features.circuit import FEATURE_EPSILON, WINDOW_NOISE
from qpa.generators.generator import make_generator
from qpa.passes.plan_layout import PlanLayout
from qpa.training.optimizer import GeneratedAdapterOptimizer
from tests.small_specs import NOWHERE, small_spec

FEATURES = ("circuit", "classical", "random", "bits")
FEATURE_MEAN = RyCnotChain.feature_mean
GOLDEN = Path(__file__).parent / "golden" / "adapter-spec-1" / "llama.json"
SPEC = AdapterSpec.from_json(GOLDEN.read_bytes(), "llama.json")
RANDOM_PLANS = {
    "aligned": PlanLayout(generator="aligned", layers=3, circuits=2),
    "more qubits": PlanLayout(generator="aligned", layers=3, circuits=3, qubits=6),
    "paper": PlanLayout(generator="paper", chunk_size=5),
    "paper, circuits": PlanLayout(generator="paper", chunk_size=7, circuits=3, layers=2),
}
PLANS = RANDOM_PLANS | {
    "spectral": PlanLayout(),
    "spectral, layers": PlanLayout(layers=2, qubits=5),
    "spectral, no windows": PlanLayout(windows=False),
    **{f"spectral, {features}": PlanLayout(features=features) for features in FEATURES[1:]},
}


@pytest.fixture(params=PLANS, ids=str)
def layout(request):
    return PLANS[request.param].run(SPEC, NOWHERE)


@pytest.fixture(params=RANDOM_PLANS, ids=str)
def random_layout(request):
    """Return a layout whose circuits start at random."""
    return RANDOM_PLANS[request.param].run(SPEC, NOWHERE)


@pytest.fixture
def paper():
    return PLANS["paper"].run(SPEC, NOWHERE)


@pytest.fixture
def no_noise(monkeypatch):
    """Put every circuit on its window exactly."""
    monkeypatch.setattr("qpa.generators.features.circuit.WINDOW_NOISE", 0.0)


def own_parameter(generator):
    """Return the one parameter of the features: angles, or what a control has in their place."""
    (parameter,) = generator.chunk_features.parameters()
    return parameter


def features_of(generator):
    return generator.features(generator.run())


def n_trained(generator):
    return sum(p.numel() for p in generator.parameters() if p.requires_grad)


def ones(layout):
    return {path: torch.ones(shape) for path, shape in basis_shapes(layout).items()}


def bits(generator):
    return {name: value.numpy().tobytes() for name, value in generator.state_dict().items()}


def test_the_output_is_exactly_zero_at_the_start(layout):
    outputs = make_generator(layout, 0)()
    assert [tuple(output.shape) for output in outputs] == [tensor.shape for tensor in layout.tensors]
    assert all(torch.equal(output, torch.zeros_like(output)) for output in outputs)


def test_the_output_is_not_zero_after_the_last_layers_move(layout):
    generator = make_generator(layout, 0, ones(layout))
    with torch.no_grad():
        for decoder in generator.decoders:
            decoder.weights[-1].fill_(0.1)
    assert all(bool((output != 0).all()) for output in generator())


def test_the_same_seed_gives_the_same_bytes(layout):
    torch.manual_seed(1)
    first = bits(make_generator(layout, 5))
    torch.manual_seed(2)
    assert bits(make_generator(layout, 5)) == first
    other = bits(make_generator(layout, 6))
    assert [n for n in first if n.startswith("chunk_features.") and other[n] == first[n]] == []


def test_making_a_generator_leaves_the_global_random_state_alone(layout):
    before = torch.get_rng_state()
    make_generator(layout, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_parameters_are_those_of_the_account(layout):
    generator = make_generator(layout, 0)
    assert n_trained(generator) == layout.account.n_generator
    own = own_parameter(generator)
    assert own.numel() * own.requires_grad == layout.account.n_angles + layout.account.n_control
    assert sum(p.numel() for p in generator.decoders.parameters()) == layout.account.n_decoder
    assert sum(output.numel() for output in generator()) == layout.account.n_adapter


def test_angles_start_within_a_full_turn(random_layout):
    ansatz = random_layout.ansatz
    angles = make_generator(random_layout, 0).chunk_features.angles.detach()
    assert angles.shape == (random_layout.n_circuits, ansatz.n_layers * ansatz.n_qubits)
    assert float(angles.min()) >= -math.pi
    assert float(angles.max()) < math.pi
    assert len(set(angles.flatten().tolist())) > 1


def test_features_are_centred_square_roots_of_scaled_probabilities(random_layout):
    layout = random_layout
    generator = make_generator(layout, 0)
    probabilities = generator.run().detach()
    expected = (probabilities * 2**layout.ansatz.n_qubits + FEATURE_EPSILON).sqrt().T
    features = features_of(generator).detach()
    assert features.shape == (2**layout.ansatz.n_qubits, layout.n_features)
    torch.testing.assert_close(features[:, -layout.n_circuits :], expected - FEATURE_MEAN)


def test_features_of_random_angles_have_mean_zero(random_layout):
    layout = random_layout
    features = [
        features_of(make_generator(layout, seed))[:, -layout.n_circuits :].flatten() for seed in range(200)
    ]
    mean = float(torch.cat(features).mean().detach())
    assert abs(mean) < 0.1  # half a standard deviation is 0.3; uncentred it would be 0.8


def test_features_and_their_gradient_are_finite_where_probabilities_are_zero(random_layout):
    layout = random_layout
    generator = make_generator(layout, 0)
    with torch.no_grad():
        generator.chunk_features.angles.zero_()
    features = features_of(generator)
    amplitudes = features[:, -layout.n_circuits :]
    assert float(amplitudes.min().detach()) == pytest.approx(math.sqrt(FEATURE_EPSILON) - FEATURE_MEAN)
    features.square().sum().backward()
    assert bool(torch.isfinite(features).all())
    assert bool(torch.isfinite(own_parameter(generator).grad).all())


def test_the_gradient_of_the_angles_is_the_difference_quotient(layout):
    generator = make_generator(layout, 0, ones(layout)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in generator.decoders.parameters():
            parameter.normal_(std=0.3)

    def loss():
        return sum(output.square().sum() for output in generator())

    loss().backward()
    if layout.features.kind == "random":
        assert own_parameter(generator).grad is None
        return
    flat, gradient = own_parameter(generator).data.view(-1), own_parameter(generator).grad.view(-1)
    for index in range(0, flat.numel(), 5):
        value = float(flat[index])
        flat[index] = value + 1e-6
        above = float(loss().detach())
        flat[index] = value - 1e-6
        below = float(loss().detach())
        flat[index] = value
        assert float(gradient[index]) == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-6)


def test_the_state_holds_parameters_and_bases_and_loads(layout):
    generator, other = make_generator(layout, 0, ones(layout)), make_generator(layout, 1)
    bases = {f"basis_{index}" for index in range(len(basis_shapes(layout)))}
    assert set(generator.state_dict()) == {name for name, _ in generator.named_parameters()} | bases
    other.load_state_dict(generator.state_dict())
    assert bits(other) == bits(generator)


@pytest.mark.parametrize("name", ["aligned", "paper"])
def test_a_layout_of_schema_1_gives_the_same_numbers_as_that_of_today(name):
    old, new = (
        WeightLayout.from_json(
            (GOLDEN.parents[1] / f"weight-layout-{version}/{name}.json").read_bytes(), name
        )
        for version in (1, WeightLayout.schema_version())
    )
    generators = [make_generator(layout, 5) for layout in (old, new)]
    assert bits(generators[0]) == bits(generators[1])
    for generator in generators:
        torch.manual_seed(0)
        for decoder in generator.decoders:
            torch.nn.init.normal_(decoder.weights[-1])
    outputs = [generator() for generator in generators]
    assert all(bool(output.any()) for output in outputs[0])
    assert all(torch.equal(left, right) for left, right in zip(*outputs, strict=True))


# The paper's generator


def test_the_index_bits_come_first_most_significant_bit_first(paper):
    features = features_of(make_generator(paper, 0))
    assert len(features) == 8
    assert paper.n_chunks == 8
    assert features[:, :3].tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 1],
        [1, 0, 0],
        [1, 0, 1],
        [1, 1, 0],
        [1, 1, 1],
    ]


def test_the_papers_mapping_model_is_affine(paper):
    (decoder,) = make_generator(paper, 0).decoders
    assert [tuple(weight.shape) for weight in decoder.weights] == [
        (32, 4),
        (64, 32),
        (128, 64),
        (128, 128),
        (64, 128),
        (32, 64),
        (32, 32),
        (5, 32),
    ]
    with torch.no_grad():
        decoder.weights[-1].normal_()
    x, y = torch.rand(2, 10, 4)
    middle = decoder(0.5 * x + 0.5 * y)
    torch.testing.assert_close(middle, 0.5 * decoder(x) + 0.5 * decoder(y), atol=1e-5, rtol=1e-4)


def test_hidden_layers_start_as_in_torch(paper):
    (decoder,) = make_generator(paper, 0).decoders
    for weight, bias in zip(list(decoder.weights)[:-1], list(decoder.biases)[:-1], strict=True):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.8 * bound < float(weight.detach().abs().max()) <= bound
        assert 0 < float(bias.detach().abs().max()) <= bound
    assert not bool(decoder.weights[-1].any())
    assert not bool(decoder.biases[-1].any())


def test_the_output_is_laid_end_to_end_over_the_tensors(paper):
    generator = make_generator(paper, 0)
    with torch.no_grad():
        generator.decoders[0].biases[-1].copy_(torch.arange(5.0))
    laid = torch.cat([output.flatten() for output in generator()])
    torch.testing.assert_close(laid, torch.arange(36.0) % 5)


# Windows: three layers of five modules


def spectral(**options):
    spec = small_spec(3, options.pop("rank", 4))
    return PlanLayout(**options).run(spec, NOWHERE)


INSIDE = math.sqrt(1 + FEATURE_EPSILON) - math.sqrt(FEATURE_EPSILON)


@pytest.mark.parametrize("n_heads", range(1, 10))
@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_window_is_one_inside_and_zero_outside(no_noise, n_heads, n_layers):
    layout = spectral(circuits=n_heads, layers=n_layers)
    features = features_of(make_generator(layout, 0)).detach()
    n_below = layout.ansatz.n_qubits - layout.features.windows.n_window_qubits
    for group in layout.groups:
        windows = [state >> n_below for state in group.states]
        expected = INSIDE * torch.eye(n_heads)[windows]
        torch.testing.assert_close(features[list(group.states)], expected, atol=1e-5, rtol=0)
        n_rows = -(-n_heads // 3)
        assert windows == [chunk * n_heads // (3 * n_rows) for chunk in range(3 * n_rows)]


def test_noise_moves_the_features_a_little():
    layout = spectral()
    features = torch.stack([features_of(make_generator(layout, seed)).detach() for seed in range(8)])
    spread = features.std(0)[list(layout.groups[0].states)].diagonal()
    assert 0 < WINDOW_NOISE < 0.1
    assert 1e-3 < float(spread.max()) < 0.3


@pytest.mark.parametrize("n_rows", [1, 2])
def test_vectors_of_a_layer_depend_on_its_circuits_alone(no_noise, n_rows):
    layout = spectral(circuits=3 * n_rows)
    generator = make_generator(layout, 0, ones(layout))
    torch.manual_seed(0)
    for decoder in generator.decoders:
        torch.nn.init.normal_(decoder.weights[-1])
    for layer in range(3):
        for parameter in generator.parameters():
            parameter.grad = None
        outputs = zip(layout.tensors, generator(), strict=True)
        sum(
            output.square().sum() for t, output in outputs if t.path.startswith(f"layers.{layer}.")
        ).backward()
        own = torch.zeros(3 * n_rows, dtype=torch.bool)
        own[layer * n_rows : (layer + 1) * n_rows] = True
        moved = generator.chunk_features.angles.grad.abs().amax(1)
        assert float(moved[own].min()) > 1e-2
        assert float(moved[~own].max()) < 1e-4
        for decoder in generator.decoders:
            moved = decoder.weights[-1].grad.abs().amax(0)
            assert float(moved[own].min()) > 1e-2
            assert float(moved[~own].max()) < 1e-4


def _vector(tensor, path, index):
    return tensor[index] if "lora_A" in path else tensor[:, index]


def test_with_exact_windows_and_no_spectrum_the_generator_is_lora_of_rank_1(no_noise):
    layout = spectral(spectrum=False, share_inputs=False)
    generator = make_generator(layout, 0)
    assert layout.account.n_decoder == sum(max(t.shape) for t in layout.tensors)
    torch.manual_seed(0)
    wanted = {t.path: torch.randn(max(t.shape)) for t in layout.tensors}
    with torch.no_grad():
        for group, decoder in zip(layout.groups, generator.decoders, strict=True):
            decoder.weights[-1].copy_(torch.stack([wanted[t.path] for t in group.tensors], 1) / INSIDE)
    cotangents = [torch.randn(t.shape) for t in layout.tensors]
    outputs = generator()
    torch.autograd.backward(outputs, cotangents)
    gradients = {}
    for group, decoder in zip(layout.groups, generator.decoders, strict=True):
        columns = decoder.weights[-1].grad.T
        gradients |= {t.path: column for t, column in zip(group.tensors, columns, strict=True)}
    for tensor, output, cotangent in zip(layout.tensors, outputs, cotangents, strict=True):
        path = tensor.path
        torch.testing.assert_close(_vector(output, path, 0), wanted[path], atol=1e-4, rtol=0)
        assert not bool(output[1:].any() if "lora_A" in path else output[:, 1:].any())
        # Up to the scale of a window, also a step of gradient descent is LoRA's.
        torch.testing.assert_close(gradients[path], INSIDE * _vector(cotangent, path, 0), atol=1e-4, rtol=0)


# Bases


def test_a_spectrum_adds_its_directions_times_their_factors(no_noise):
    layout = spectral(circuits=3, vectors=("none",))
    torch.manual_seed(0)
    bases = {path: torch.randn(shape) for path, shape in basis_shapes(layout).items()}
    generator = make_generator(layout, 0, bases)
    for decoder in generator.decoders:
        torch.nn.init.normal_(decoder.weights[-1])
    values = dict(zip([t.path for t in layout.tensors], generator(), strict=True))
    for group, decoder in zip(layout.groups, generator.decoders, strict=True):
        for layer, (a, b) in enumerate(zip(group.tensors[::2], group.tensors[1::2], strict=True)):
            factors = INSIDE * decoder.weights[-1][:, layer].detach()
            expected = bases[b.path] @ torch.diag(factors) @ bases[a.path]
            torch.testing.assert_close(values[b.path] @ values[a.path], expected, atol=1e-3, rtol=1e-3)
            assert torch.equal(values[a.path], bases[a.path])


def test_with_bases_lora_b_is_exactly_zero_at_the_start():
    layout = spectral(circuits=6)
    outputs = make_generator(layout, 0, ones(layout))()
    for tensor, output in zip(layout.tensors, outputs, strict=True):
        assert bool(output.any()) == ("lora_A" in tensor.path)


def test_bases_of_another_shape_or_none_at_all_are_refused():
    layout = spectral()
    path, shape = next(iter(basis_shapes(layout).items()))
    bases = ones(layout)
    with pytest.raises(ShapeError, match=rf"^{path}: expected a basis of shape .*, found \(1, 1\)"):
        make_generator(layout, 0, bases | {path: torch.ones(1, 1)})
    del bases[path]
    with pytest.raises(ShapeError, match=rf"^{path}: expected a basis of shape .*{shape[1]}\), found none"):
        make_generator(layout, 0).set_bases(bases)


# Features and their controls


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("plan", [PlanLayout(), PlanLayout(windows=False), PlanLayout(circuits=2, layers=3)])
def test_every_kind_of_features_trains_as_many_numbers_as_the_account_says(features, plan):
    layout = replace(plan, features=features).run(small_spec(3, 4), NOWHERE)
    generator = make_generator(layout, 0)
    n_heads, windows = layout.n_circuits, layout.features.windows
    n_table = 2 ** (windows.n_window_qubits + windows.n_chunk_qubits if windows else layout.ansatz.n_qubits)
    assert (
        layout.account.n_angles + layout.account.n_control
        == {
            "circuit": n_heads * layout.ansatz.n_layers * layout.ansatz.n_qubits,
            "classical": n_heads * n_table,
            "random": 0,
            "bits": n_heads * (layout.ansatz.n_qubits + 1),
        }[features]
    )
    assert n_trained(generator) == layout.account.n_generator
    assert (layout.account.n_control > 0) == (features in ("classical", "bits"))
    assert features_of(generator).shape == (2**layout.ansatz.n_qubits, n_heads)


@pytest.mark.parametrize("features", FEATURES)
def test_features_train_unless_they_are_random(features):
    layout = spectral(features=features)
    generator = make_generator(layout, 0, ones(layout))
    adapter = [torch.nn.Parameter(torch.ones(tensor.shape)) for tensor in layout.tensors]
    optimizer = GeneratedAdapterOptimizer(adapter, generator, lr=0.1, angle_lr=0.1)
    start, sent = (
        own_parameter(generator).detach().clone(),
        torch.randn(1, generator=torch.Generator().manual_seed(0)),
    )
    for _ in range(3):
        for parameter in adapter:
            parameter.grad = sent.expand(parameter.shape).clone()
        optimizer.step()
    held = {id(p) for group in optimizer.inner.param_groups for p in group["params"]}
    trains = features != "random"
    assert (id(own_parameter(generator)) in held) == trains
    assert torch.equal(own_parameter(generator).detach(), start) != trains
    assert len(optimizer.inner.state) == len(layout.groups) + trains
    assert sum(p.numel() for p in generator.parameters() if id(p) in held) == layout.account.n_generator


def test_the_classical_table_is_the_same_for_every_group_and_starts_on_the_windows(no_noise):
    layout = spectral(features="classical")
    features = features_of(make_generator(layout, 0)).detach()
    for group in layout.groups:
        assert torch.equal(features[list(group.states)], torch.eye(3))


def test_the_bits_of_the_state_decide_the_control_of_that_name():
    layout = spectral(features="bits")
    generator = make_generator(layout, 0)
    weights = generator.chunk_features.weights.detach()
    features = features_of(generator).detach()
    for state in (0, 5, 2**layout.ansatz.n_qubits - 1):
        signs = [2 * int(bit) - 1 for bit in f"{state:0{layout.ansatz.n_qubits}b}"]
        expected = torch.tanh(weights @ torch.tensor([*signs, 1.0]))
        torch.testing.assert_close(features[state], expected)


# Initial values


def test_lora_b_starts_at_zero_and_lora_a_within_its_bound():
    path, shape = "q_proj.lora_A.weight", (8, 400)
    value = initial_value(path, shape, "kaiming_uniform", 0)
    assert 0.95 / 20 < float(value.abs().max()) <= 1 / 20
    assert torch.equal(initial_value(path, shape, "zeros", 0), torch.zeros(8, 400))
    assert value.dtype == torch.float32


def test_an_initial_value_depends_on_seed_and_path_only():
    value = initial_value("q", (2, 4), "kaiming_uniform", 3)
    torch.manual_seed(9)
    assert torch.equal(initial_value("q", (2, 4), "kaiming_uniform", 3), value)
    assert not torch.equal(initial_value("k", (2, 4), "kaiming_uniform", 3), value)
    assert not torch.equal(initial_value("q", (2, 4), "kaiming_uniform", 4), value)
