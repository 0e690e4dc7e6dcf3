import math
from pathlib import Path

import pytest
import torch

from qpa.documents import AdapterSpec, ChunkedTensor
from qpa.generator import FEATURE_EPSILON, FEATURE_MEAN, Generator, initial_value
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline import PassContext
from qpa.run_directory import DirectoryStore

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))
GOLDEN = Path(__file__).parent / "golden" / "adapter-spec-1" / "llama.json"
SPEC = AdapterSpec.from_json(GOLDEN.read_bytes(), "llama.json")
PLANS = {
    "aligned": PlanLayout(layers=3, heads=2),
    "more qubits": PlanLayout(layers=3, heads=3, qubits=6),
    "paper": PlanLayout(generator="paper", chunk_size=5),
    "paper, heads": PlanLayout(generator="paper", chunk_size=7, heads=3, layers=2),
}


@pytest.fixture(params=PLANS, ids=str)
def layout(request):
    return PLANS[request.param].run(SPEC, NOWHERE)


@pytest.fixture
def paper():
    return PLANS["paper"].run(SPEC, NOWHERE)


def bits(generator):
    return {name: value.numpy().tobytes() for name, value in generator.state_dict().items()}


def test_the_output_is_exactly_zero_at_the_start(layout):
    outputs = Generator(layout, 0)()
    assert [tuple(output.shape) for output in outputs] == [tensor.shape for tensor in layout.tensors]
    assert all(torch.equal(output, torch.zeros_like(output)) for output in outputs)


def test_the_output_is_not_zero_after_the_last_layers_move(layout):
    generator = Generator(layout, 0)
    with torch.no_grad():
        for decoder in generator.decoders:
            decoder.weights[-1].fill_(0.1)
    assert all(bool((output != 0).all()) for output in generator())


def test_the_same_seed_gives_the_same_bytes(layout):
    torch.manual_seed(1)
    first = bits(Generator(layout, 5))
    torch.manual_seed(2)
    assert bits(Generator(layout, 5)) == first
    assert bits(Generator(layout, 6))["angles"] != first["angles"]


def test_making_a_generator_leaves_the_global_random_state_alone(layout):
    before = torch.get_rng_state()
    Generator(layout, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_parameters_are_those_of_the_account(layout):
    generator = Generator(layout, 0)
    assert generator.n_parameters == layout.account.n_generator
    assert generator.angles.numel() == layout.account.n_angles
    assert sum(p.numel() for p in generator.decoders.parameters()) == layout.account.n_decoder
    assert sum(output.numel() for output in generator()) == layout.account.n_adapter


def test_angles_start_within_a_full_turn(layout):
    angles = Generator(layout, 0).angles.detach()
    assert angles.shape == (layout.n_circuits, layout.n_layers, layout.n_qubits)
    assert float(angles.min()) >= -math.pi
    assert float(angles.max()) < math.pi
    assert len(set(angles.flatten().tolist())) > 1


def test_features_are_centred_square_roots_of_scaled_probabilities(layout):
    generator = Generator(layout, 0)
    probabilities = generator.source.probabilities(generator.angles.detach())
    expected = (probabilities[:, : layout.n_chunks] * 2**layout.n_qubits + FEATURE_EPSILON).sqrt().T
    features = generator.features().detach()
    assert features.shape == (layout.n_chunks, layout.n_features)
    torch.testing.assert_close(features[:, -layout.n_circuits :], expected - FEATURE_MEAN)


def test_features_of_random_angles_have_mean_zero(layout):
    features = [Generator(layout, seed).features()[:, -layout.n_circuits :].flatten() for seed in range(200)]
    mean = float(torch.cat(features).mean().detach())
    assert abs(mean) < 0.1  # half a standard deviation is 0.3; uncentred it would be 0.8


def test_features_and_their_gradient_are_finite_where_probabilities_are_zero(layout):
    generator = Generator(layout, 0)
    with torch.no_grad():
        generator.angles.zero_()
    features = generator.features()
    amplitudes = features[:, -layout.n_circuits :]
    assert float(amplitudes.min().detach()) == pytest.approx(math.sqrt(FEATURE_EPSILON) - FEATURE_MEAN)
    features.square().sum().backward()
    assert bool(torch.isfinite(features).all())
    assert bool(torch.isfinite(generator.angles.grad).all())


def test_the_gradient_of_the_angles_is_the_difference_quotient(layout):
    generator = Generator(layout, 0).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in generator.decoders.parameters():
            parameter.normal_(std=0.3)

    def loss():
        return sum(output.square().sum() for output in generator())

    loss().backward()
    flat, gradient = generator.angles.data.view(-1), generator.angles.grad.view(-1)
    for index in range(0, flat.numel(), 5):
        value = float(flat[index])
        flat[index] = value + 1e-6
        above = float(loss().detach())
        flat[index] = value - 1e-6
        below = float(loss().detach())
        flat[index] = value
        assert float(gradient[index]) == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-6)


def test_the_state_holds_parameters_only_and_loads(layout):
    generator, other = Generator(layout, 0), Generator(layout, 1)
    assert set(generator.state_dict()) == {name for name, _ in generator.named_parameters()}
    other.load_state_dict(generator.state_dict())
    assert bits(other) == bits(generator)


# The paper's generator


def test_the_index_bits_come_first_most_significant_bit_first(paper):
    features = Generator(paper, 0).features()
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
    (decoder,) = Generator(paper, 0).decoders
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
    (decoder,) = Generator(paper, 0).decoders
    for weight, bias in zip(list(decoder.weights)[:-1], list(decoder.biases)[:-1], strict=True):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.8 * bound < float(weight.detach().abs().max()) <= bound
        assert 0 < float(bias.detach().abs().max()) <= bound
    assert not bool(decoder.weights[-1].any())
    assert not bool(decoder.biases[-1].any())


def test_the_output_is_laid_end_to_end_over_the_tensors(paper):
    generator = Generator(paper, 0)
    with torch.no_grad():
        generator.decoders[0].biases[-1].copy_(torch.arange(5.0))
    laid = torch.cat([output.flatten() for output in generator()])
    torch.testing.assert_close(laid, torch.arange(36.0) % 5)


# Initial values


def test_lora_b_starts_at_zero_and_lora_a_within_its_bound():
    tensor = ChunkedTensor(path="q_proj.lora_A.weight", shape=(8, 400))
    value = initial_value(tensor, "kaiming_uniform", 0)
    assert 0.95 / 20 < float(value.abs().max()) <= 1 / 20
    assert torch.equal(initial_value(tensor, "zeros", 0), torch.zeros(8, 400))
    assert value.dtype == torch.float32


def test_an_initial_value_depends_on_seed_and_path_only():
    q, k = (ChunkedTensor(path=path, shape=(2, 4)) for path in ("q", "k"))
    value = initial_value(q, "kaiming_uniform", 3)
    torch.manual_seed(9)
    assert torch.equal(initial_value(q, "kaiming_uniform", 3), value)
    assert not torch.equal(initial_value(k, "kaiming_uniform", 3), value)
    assert not torch.equal(initial_value(q, "kaiming_uniform", 4), value)
