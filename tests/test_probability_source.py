import math
from pathlib import Path

import pytest
import torch

from qpa.circuits.sources.exact import ExactSimulator
from qpa.circuits.sources.source import differentiable_probabilities
from qpa.documents import AdapterSpec
from qpa.generators.generator import Generator
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from qpa.training.optimizer import GeneratedAdapterOptimizer

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))


class ParameterShift:
    """A source that can only run circuits, as a device can: no state, no autograd.

    dp/dangle = (p(angle + pi/2) - p(angle - pi/2)) / 2.
    """

    def __init__(self):
        self.n_runs = 0

    def probabilities(self, angles):
        self.n_runs += 1
        with torch.no_grad():
            return ExactSimulator().probabilities(angles.double()).to(angles.dtype)

    def vjp(self, angles, cotangent):
        gradient = torch.zeros_like(angles)
        for layer in range(angles.shape[1]):
            for qubit in range(angles.shape[2]):
                shift = torch.zeros_like(angles)
                shift[:, layer, qubit] = math.pi / 2
                difference = self.probabilities(angles + shift) - self.probabilities(angles - shift)
                gradient[:, layer, qubit] = 0.5 * (difference * cotangent).sum(1)
        return gradient


@pytest.fixture
def layout():
    golden = Path(__file__).parent / "golden" / "adapter-spec-1" / "llama.json"
    spec = AdapterSpec.from_json(golden.read_bytes(), "llama.json")
    return PlanLayout(generator="aligned", layers=3, heads=2).run(spec, NOWHERE)


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
    exact = gradients(decoders_off_zero(Generator(layout, 3)), adapter_gradients)
    source = ParameterShift()
    shifted = gradients(decoders_off_zero(Generator(layout, 3, source=source)), adapter_gradients)
    assert exact.keys() == shifted.keys()
    assert float(exact["angles"].abs().min()) > 1e-4
    for name, gradient in exact.items():
        torch.testing.assert_close(shifted[name], gradient, atol=1e-4, rtol=1e-4)
    assert source.n_runs == 1 + 2 * 3 * 3


def train(layout, source):
    torch.manual_seed(0)
    adapter = [torch.nn.Parameter(torch.randn(tensor.shape)) for tensor in layout.tensors]
    targets = [torch.randn(tensor.shape) for tensor in layout.tensors]
    generator = Generator(layout, 3, source=source)
    optimizer = GeneratedAdapterOptimizer(adapter, generator, lr=0.05, angle_lr=0.05, eps=1e-3)
    start = generator.angles.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        sum((p - t).square().sum() for p, t in zip(adapter, targets, strict=True)).backward()
        optimizer.step()
    return adapter, generator.angles.detach() - start


def test_a_source_without_autograd_trains_the_same_adapter(layout):
    exact, exact_moved = train(layout, ExactSimulator())
    shifted, shifted_moved = train(layout, ParameterShift())
    assert float(exact_moved.abs().max()) > 0.05
    torch.testing.assert_close(shifted_moved, exact_moved, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(shifted, exact, atol=1e-4, rtol=1e-4)


def test_the_exact_simulator_runs_once_forward_and_back(monkeypatch):
    angles = torch.rand(2, 3, 4, requires_grad=True)
    monkeypatch.setattr(ExactSimulator, "vjp", lambda *_: pytest.fail("the circuits would run twice"))
    differentiable_probabilities(ExactSimulator(), angles)[:, 0].sum().backward()
    assert float(angles.grad.abs().max()) > 0


def test_a_source_sees_angles_without_a_graph():
    seen = []

    class Recorder(ParameterShift):
        def probabilities(self, angles):
            seen.append(angles.requires_grad)
            return super().probabilities(angles)

    angles = torch.rand(1, 1, 2, requires_grad=True)
    probabilities = differentiable_probabilities(Recorder(), angles)
    assert probabilities.requires_grad
    assert seen == [False]
