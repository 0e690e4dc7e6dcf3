"""Matrix product states, angles fitted to a target, and the methods that start there."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import warm_start
from benchmarks.matrix_product import fit_angles, to_matrix_product, to_vector
from qpa.bench.method import Attached
from qpa.bench.setting import Setting
from qpa.bench.task import Task, load_task
from qpa.bench.trial import losses, run_trial
from qpa.circuits.circuit import Circuit
from qpa.documents import ChunkedTensor, ChunkGroup
from qpa.documents.weight_layout import Decoder
from qpa.errors import OptionError, ShapeError
from qpa.generators.features.circuit import root_in_window
from tests.chains import chain

BUDGET = 40


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fidelity(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) ** 2 / float((a @ a) * (b @ b))


@pytest.mark.parametrize("n_qubits", [1, 2, 5, 6])
def test_a_full_bond_is_exact(n_qubits: int) -> None:
    vector = normal(2**n_qubits)
    cores = to_matrix_product(vector, 2 ** (n_qubits // 2))
    assert len(cores) == n_qubits
    assert cores[0].shape[0] == cores[-1].shape[-1] == 1
    torch.testing.assert_close(to_vector(cores), vector / vector.norm())


def test_a_bond_of_one_holds_a_product_whose_first_factor_is_the_most_significant_bit() -> None:
    factors = normal(5, 2)
    vector = factors[0]
    for factor in factors[1:]:
        vector = torch.kron(vector, factor)
    cores = to_matrix_product(vector, 1)
    assert [core.shape for core in cores] == [(1, 2, 1)] * 5
    torch.testing.assert_close(to_vector(cores), vector / vector.norm())
    cosine = torch.nn.functional.cosine_similarity(cores[0].flatten(), factors[0], dim=0)
    assert abs(float(cosine)) == pytest.approx(1)


def test_a_larger_bond_is_never_worse() -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    smooth = torch.exp(-4 * (x - 0.3) ** 2) * (1.2 + torch.sin(9 * x))
    found = [fidelity(to_vector(to_matrix_product(smooth, bond)), smooth) for bond in (1, 2, 3, 4, 6)]
    assert found[0] < 0.9
    assert found == sorted(found)
    assert found[-1] > 0.9999
    rough = normal(256)
    found = [fidelity(to_vector(to_matrix_product(rough, bond)), rough) for bond in range(1, 17)]
    assert all(a < b for a, b in pairwise(found))


def test_a_fit_finds_a_target_that_the_circuit_prepares() -> None:
    ansatz = chain(6, 5)
    circuit = Circuit(ansatz)
    target = circuit.exact_probabilities(math.pi * normal(1, ansatz.n_angles, seed=3))[0]
    fit = fit_angles(ansatz, target, seed=0)
    assert fit.fidelity > 0.999
    assert fit.angles.shape == (ansatz.n_angles,)
    found = circuit.exact_probabilities(fit.angles[None])[0]
    assert float(torch.sqrt(found * target).sum()) ** 2 == pytest.approx(fit.fidelity, abs=1e-6)


def test_a_fit_is_that_of_its_seed_and_no_worse_with_more_starts() -> None:
    ansatz, target = chain(2, 5), normal(32).square()
    first, again = (fit_angles(ansatz, target, seed=1, n_starts=1) for _ in range(2))
    assert torch.equal(first.angles, again.angles) and first.fidelity == again.fidelity
    assert not torch.equal(first.angles, fit_angles(ansatz, target, seed=2, n_starts=1).angles)
    assert fit_angles(ansatz, target, seed=1, n_starts=3).fidelity >= first.fidelity


def test_what_is_no_state_is_refused() -> None:
    for vector in (torch.ones(1), torch.ones(6), torch.ones(2, 2)):
        with pytest.raises(ShapeError):
            to_matrix_product(vector, 2)
    with pytest.raises(OptionError):
        to_matrix_product(torch.ones(4), 0)
    with pytest.raises(ShapeError):
        fit_angles(chain(1, 3), torch.ones(4), seed=0)
    with pytest.raises(OptionError):
        fit_angles(chain(1, 2), torch.ones(4), seed=0, n_starts=0)


def test_the_features_of_a_target_are_its_coefficients() -> None:
    coefficients, states = normal(9).abs(), torch.arange(9) + 3
    amplitudes = warm_start.amplitudes_of(coefficients, states, 4)
    assert float(amplitudes.norm()) == pytest.approx(1)
    features = root_in_window(amplitudes.square(), 16)
    ratios = features[states] / coefficients
    torch.testing.assert_close(ratios, ratios[:1].expand(9))
    assert float(features[0]) == pytest.approx(float(ratios[0] * coefficients.mean()))


def test_a_warm_start_changes_nothing_at_first_and_trains(
    llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.matrix_product.MAX_ITERATIONS", 40)
    task = load_task(Setting(str(llama), text_file, max_steps=2, batch_size=2, max_length=32))
    warm, uniform = (warm_start.methods()[f"warm:{name}"] for name in ("exact", "start-uniform"))
    (configuration, *_) = warm.sizes(task.base, [BUDGET])
    assert uniform.sizes(task.base, [BUDGET])[0] == configuration
    attached, plain = (
        method.attach(task.base, configuration, rate=0.05, seed=0) for method in (warm, uniform)
    )
    assert losses(task, attached.model.eval()) == losses(task, task.base.load())
    assert cosine_to_free_steps(task, attached) > cosine_to_free_steps(task, plain) + 0.005
    measured = run_trial(task, warm, configuration, 0.05, seed=0)
    assert measured.n_trained == configuration.n_trained
    assert (measured.validation, measured.test) != losses(task, task.base.load())


def test_a_warm_start_of_aligned_changes_nothing_at_first_and_has_the_wanted_features(
    llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.matrix_product.MAX_ITERATIONS", 40)
    task = load_task(Setting(str(llama), text_file, max_steps=2, batch_size=2, max_length=32))
    warm, random = (warm_start.methods()[f"warm-aligned:{name}"] for name in ("exact", "start-random"))
    (configuration, *_) = warm.sizes(task.base, [2000])
    assert random.sizes(task.base, [2000])[0] == configuration
    attached, plain = (
        method.attach(task.base, configuration, rate=0.01, seed=0) for method in (warm, random)
    )
    assert losses(task, attached.model.eval()) == losses(task, task.base.load())
    generator, at_random = (one.optimizer.generator for one in (attached, plain))  # type: ignore[attr-defined]
    wanted = warm._wanted(task.base, generator.layout, seed=0)  # type: ignore[attr-defined]
    states = torch.tensor(generator.layout.states)
    near, far = (
        torch.nn.functional.cosine_similarity(one.features(one.run())[states].double(), wanted, dim=0)
        for one in (generator, at_random)
    )
    assert bool((near > far.abs() + 0.05).all())
    measured = run_trial(task, warm, configuration, 0.01, seed=0)
    assert measured.n_trained == configuration.n_trained


def test_singular_vectors_of_chunks_are_those_of_their_group() -> None:
    group = ChunkGroup(
        name="q.lora_B",
        axis="column",
        tensors=(ChunkedTensor(path="b", shape=(3, 2), chunks=(1, 0)),),
        states=(0, 1),
        chunk_size=3,
        decoder=Decoder(kind="linear", widths=(1, 3), has_bias=False),
    )
    moved = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = warm_start._left_singular(group, {"b": moved}, 1)
    torch.testing.assert_close(found.abs(), torch.tensor([[1.0], [0.0]], dtype=torch.float64))


def cosine_to_free_steps(task: Task, attached: Attached) -> float:
    """Return the cosine between the features of a method's start and what ten free steps give."""
    generator = attached.optimizer.generator  # type: ignore[attr-defined]
    found = generator.features(generator.run())[torch.tensor(generator.layout.states), 0]
    free = warm_start._free_features(task.base, seed=0)
    return float(torch.nn.functional.cosine_similarity(found.detach(), free, dim=0))
