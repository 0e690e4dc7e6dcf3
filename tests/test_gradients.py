import copy
from pathlib import Path

import pytest
import torch

from qpa.circuits.ansatz import ANSATZE, AnsatzKind, make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.parameter_shift import ParameterShift
from qpa.circuits.gradients.spsa import Spsa
from qpa.circuits.gradients.surrogate import Surrogate, apply_channel, fit_channel
from qpa.circuits.sources.exact import ExactSimulator
from qpa.circuits.sources.source import SOURCES, Cost, SourceSettings
from qpa.documents import AdapterSpec
from qpa.errors import OptionError
from qpa.generators.features.states import state_bits
from qpa.generators.generator import make_generator
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from qpa.training.optimizer import GeneratedAdapterOptimizer

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))


class Device:
    """A source that can only run circuits, as a device can: no state, no autograd."""

    name = "device"
    is_differentiable = False
    runs_native = False
    needs_backend = False
    is_paid = False
    shots = None

    def __init__(self, seed=0):
        self.n_runs = 0
        self.n_evaluations = 0

    def probabilities(self, circuit, angles):
        assert not angles.requires_grad
        self.n_runs += 1
        self.n_evaluations += len(angles)
        return ExactSimulator().probabilities(circuit, angles.double()).to(angles.dtype)

    def cost(self, circuit, n_evaluations):
        return Cost(n_evaluations, n_evaluations, 1)


def on_device(layout, device=None):
    return Execution(Circuit(layout.ansatz), device or Device(), ParameterShift())


@pytest.fixture
def layout():
    golden = Path(__file__).parent / "golden" / "adapter-spec-1" / "llama.json"
    spec = AdapterSpec.from_json(golden.read_bytes(), "llama.json")
    return PlanLayout(generator="aligned", layers=3, circuits=2).run(spec, NOWHERE)


def gradients(generator, adapter_gradients):
    torch.autograd.backward(generator(), adapter_gradients)
    return {name: parameter.grad for name, parameter in generator.named_parameters()}


def decoders_off_zero(generator):
    """Move the decoders away from zero, where the angles have no gradient."""
    torch.manual_seed(1)
    for parameter in generator.decoders.parameters():
        torch.nn.init.normal_(parameter)
    return generator


def test_a_source_without_autograd_gives_the_exact_gradients(layout):
    torch.manual_seed(0)
    adapter_gradients = [torch.randn(tensor.shape) for tensor in layout.tensors]
    exact = gradients(decoders_off_zero(make_generator(layout, 3)), adapter_gradients)
    source = Device()
    shifted = gradients(
        decoders_off_zero(make_generator(layout, 3, execution=on_device(layout, source))), adapter_gradients
    )
    assert exact.keys() == shifted.keys()
    assert float(exact["chunk_features.angles"].abs().min()) > 1e-4
    for name, gradient in exact.items():
        torch.testing.assert_close(shifted[name], gradient, atol=1e-4, rtol=1e-4)
    # The circuits once, and all shifts of all their angles in one call.
    n_angles = layout.ansatz.n_angles
    assert n_angles == 3 * 3
    assert (source.n_runs, source.n_evaluations) == (2, 2 + 2 * n_angles * 2)
    assert on_device(layout).step_cost(2) == Cost(2 + 36, 2 + 36, 2)


def train(layout, execution):
    torch.manual_seed(0)
    adapter = [torch.nn.Parameter(torch.randn(tensor.shape)) for tensor in layout.tensors]
    targets = [torch.randn(tensor.shape) for tensor in layout.tensors]
    generator = make_generator(layout, 3, execution=execution)
    optimizer = GeneratedAdapterOptimizer(adapter, generator, lr=0.05, angle_lr=0.05, eps=1e-3)
    start = generator.chunk_features.angles.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        sum((p - t).square().sum() for p, t in zip(adapter, targets, strict=True)).backward()
        optimizer.step()
    return adapter, generator.chunk_features.angles.detach() - start


def test_a_source_without_autograd_trains_the_same_adapter(layout):
    exact, exact_moved = train(layout, Execution(Circuit(layout.ansatz)))
    device = Device()
    shifted, shifted_moved = train(layout, on_device(layout, device))
    assert float(exact_moved.abs().max()) > 0.05
    torch.testing.assert_close(shifted_moved, exact_moved, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(shifted, exact, atol=1e-4, rtol=1e-4)
    assert device.n_runs == 1 + 4 * 2


def test_an_optimizer_that_is_loaded_measures_nothing(layout):
    torch.manual_seed(0)
    adapter = [torch.nn.Parameter(torch.randn(tensor.shape)) for tensor in layout.tensors]
    device = Device()
    optimizer = GeneratedAdapterOptimizer(
        adapter, make_generator(layout, 3, execution=on_device(layout, device))
    )
    state = copy.deepcopy(optimizer.state_dict())
    state["measured"] += 0.25
    n_runs, before = device.n_runs, [p.detach().clone() for p in adapter]
    torch.nn.init.ones_(optimizer.generator.decoders[0].weights[-1])
    optimizer.load_state_dict(state)
    assert device.n_runs == n_runs
    assert torch.equal(optimizer.state_dict()["measured"], state["measured"])
    torch.testing.assert_close([p.detach() for p in adapter], before)


def test_the_exact_simulator_runs_once_forward_and_back(monkeypatch):
    execution = Execution(Circuit(make_ansatz("ry-cnot-chain", 4, 3)))
    angles = torch.rand(2, 12, requires_grad=True)
    monkeypatch.setattr(Adjoint, "vjp", lambda *_: pytest.fail("the circuits would run twice"))
    execution.run(angles)[:, 0].sum().backward()
    assert float(angles.grad.abs().max()) > 0


def test_a_source_sees_angles_without_a_graph():
    angles = torch.rand(1, 2, requires_grad=True)
    execution = Execution(Circuit(make_ansatz("ry-cnot-chain", 2, 1)), Device(), ParameterShift())
    assert execution.run(angles).requires_grad


def test_adjoint_gradients_want_a_source_that_is_simulated():
    circuit = Circuit(make_ansatz("ry-cnot-chain", 2, 1))
    with pytest.raises(
        OptionError, match=r"^source: expected a source that is simulated, for adjoint gradients"
    ):
        Execution(circuit, Device(), Adjoint())


@pytest.mark.parametrize("n_qubits", [1, 2, 5, 8])
def test_the_chain_gate_by_gate_is_its_fast_form(n_qubits):
    ansatz = make_ansatz("ry-cnot-chain", n_qubits, 3)
    angles = torch.rand(4, ansatz.n_angles, dtype=torch.float64, requires_grad=True)
    fast = Circuit(ansatz).exact_probabilities(angles)
    slow = AnsatzKind.probabilities(ANSATZE[ansatz.kind], ansatz, angles)
    torch.testing.assert_close(slow, fast, atol=1e-12, rtol=0)
    cotangent = torch.rand_like(fast)
    gradients = [torch.autograd.grad(p, angles, cotangent)[0] for p in (slow, fast)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n_qubits", [1, 2, 5, 8])
def test_the_last_chain_of_cnots_is_a_permutation_of_the_histogram(n_qubits):
    ansatz = make_ansatz("ry-cnot-chain", n_qubits, 1)
    angles = torch.rand(1, n_qubits, dtype=torch.float64)
    ones = (angles[0] / 2).sin().square()
    bits = state_bits(2**n_qubits, n_qubits).double()
    without_chain = (bits * ones + (1 - bits) * (1 - ones)).prod(1)
    permutation = ANSATZE[ansatz.kind].last_layer_permutation(ansatz)
    found = Circuit(ansatz).exact_probabilities(angles)[0]
    torch.testing.assert_close(without_chain[permutation], found, atol=1e-12, rtol=0)


def vjp_of(estimator, source, seed=0, n_circuits=2):
    """Return an estimate and the exact gradient for random angles and cotangents of five qubits."""
    circuit = Circuit(make_ansatz("ry-cnot-chain", 5, 3))
    random = torch.Generator().manual_seed(seed)
    angles = torch.randn(n_circuits, circuit.n_angles, generator=random)
    cotangent = torch.randn(n_circuits, circuit.n_states, generator=random)
    measured = source.probabilities(circuit, angles)
    exact = Adjoint().vjp(ExactSimulator(), circuit, angles, measured, cotangent)
    return estimator.vjp(source, circuit, angles, measured, cotangent), exact


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


def shots_of(seed, shots):
    return SOURCES["shots"](SourceSettings(seed, shots))


def test_parameter_shift_of_shots_is_unbiased_and_better_with_more_of_them():
    found = [cosine(*vjp_of(ParameterShift(), shots_of(1, shots))) for shots in (64, 1024, 16384)]
    assert found[0] < found[1] < found[2] and found[2] > 0.99
    estimates, (_, exact) = [], vjp_of(ParameterShift(), shots_of(0, 64))
    estimates = [vjp_of(ParameterShift(), shots_of(seed, 64))[0] for seed in range(40)]
    error = torch.stack(estimates).std(0) / 40**0.5
    deviation = (torch.stack(estimates).mean(0) - exact) / error
    assert float(deviation.square().mean()) < 2  # 1 is to be expected, with 30 angles' spread


def test_spsa_is_unbiased_and_its_cosine_is_small():
    """The mean over directions is the gradient, up to the square of the step; one direction is far off."""
    estimates = [vjp_of(Spsa(seed), ExactSimulator()) for seed in range(400)]
    exact = estimates[0][1]
    one = [abs(cosine(found, exact)) for found, _ in estimates]
    assert 0.05 < sum(one) / len(one) < 0.35  # about sqrt(2 / (pi 30)) = 0.15
    mean = torch.stack([found for found, _ in estimates]).mean(0)
    assert cosine(mean, exact) > 0.9
    assert float((mean * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.3)
    again = vjp_of(Spsa(7), ExactSimulator())[0]
    assert torch.equal(vjp_of(Spsa(7), ExactSimulator())[0], again)


def test_the_surrogate_is_the_gradient_where_there_is_no_noise():
    found, exact = vjp_of(Surrogate(), ExactSimulator())
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)


def test_the_surrogate_finds_the_channel_and_is_its_gradient():
    random = torch.Generator().manual_seed(3)
    exact = torch.rand(2, 32, generator=random, dtype=torch.float64)
    exact /= exact.sum(1, keepdim=True)
    channel = torch.tensor([0.8, *torch.rand(10, generator=random).mul(0.1).tolist()], dtype=torch.float64)
    measured = apply_channel(exact, channel)
    torch.testing.assert_close(measured.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(fit_channel(exact, measured), channel, atol=1e-3, rtol=0)

    class Channel(Device):
        def probabilities(self, circuit, angles):
            return apply_channel(circuit.exact_probabilities(angles.double()), channel).float()

    found, without = vjp_of(Surrogate(), Channel())
    shifted, _ = vjp_of(ParameterShift(), Channel())
    torch.testing.assert_close(found, shifted, atol=2e-4, rtol=1e-2)
    assert not torch.allclose(found, without, rtol=0.05)


@pytest.mark.parametrize(
    ("estimator", "n_runs"),
    [(ParameterShift(), 2 * 15 * 2), (Spsa(), 2 * 2), (Surrogate(), 0), (Adjoint(), 2)],
)
def test_an_estimator_says_what_it_runs(estimator, n_runs):
    device = Device()
    circuit = Circuit(make_ansatz("ry-cnot-chain", 5, 3))
    assert estimator.n_evaluations(circuit, 2) == n_runs
    if not estimator.needs_differentiable:
        vjp_of(estimator, device)
        assert device.n_evaluations == 2 + n_runs
