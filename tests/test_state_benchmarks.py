"""The methods that only benchmarks have: what their tables say of them is what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import state_bases, state_variants
from qpa.bench.method import Attached
from qpa.bench.setting import Setting
from qpa.bench.task import Task, load_task
from qpa.bench.trial import losses, run_trial
from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.generators.features.kind import FEATURES

BUDGET = 40
NAMES = [variant.name for variant in state_variants.VARIANTS]
# Not rank-64: the sides of this model are shorter.
VARIANTS = [f"variant:{name}" for name in (*NAMES, "grown", "fitted", "circuits-3", "rank-16")]


@pytest.fixture(scope="module", autouse=True)
def _features_are_removed():
    state_variants.methods(2)
    yield
    for name in (*NAMES, "grown"):
        FEATURES.remove(name)


@pytest.fixture(scope="module")
def task(llama: Path, text_file: Path) -> Task:
    return load_task(Setting(str(llama), text_file, max_steps=2, batch_size=2, max_length=32))


def attach(task: Task, method, seed: int = 0) -> Attached:
    (configuration, *_) = method.sizes(task.base, [BUDGET])
    return method.attach(task.base, configuration, rate=0.05, seed=seed)


def test_the_variants_simulation_is_the_exact_simulator() -> None:
    angles = torch.randn((3, 5), generator=torch.Generator().manual_seed(1))
    permutation = state_variants.permutation_of(state_variants.chain((2, 3))[0], 5)
    found = state_variants.amplitudes(angles, [permutation]) ** 2
    expected = Circuit(make_ansatz("ry-cnot-chain", 5, 3)).exact_probabilities(angles.flatten()[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_basis_y_is_uniform_at_the_start_and_normalised() -> None:
    uniform = torch.full((8,), 8**-0.5)
    torch.testing.assert_close(state_variants.in_basis_y(uniform, 3), torch.full((8,), 1 / 8))
    state = torch.nn.functional.normalize(torch.arange(8.0), dim=0)
    assert float(state_variants.in_basis_y(state, 3).sum()) == pytest.approx(1, abs=1e-6)


def test_registers_are_joined_inside_or_across() -> None:
    registers = (2, 3, 2)
    inside, across = state_variants.within(registers)[0], state_variants.across(registers)[0]
    assert across == [(1, 2), (4, 5)]
    assert sorted(inside + across) == state_variants.chain(registers)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_nothing_at_first_and_trains(task: Task, name: str) -> None:
    method = state_variants.methods(task.setting.max_steps)[name]
    sizes = method.sizes(task.base, [BUDGET])
    assert losses(task, attach(task, method).model.eval()) == losses(task, task.base.load())
    measured = run_trial(task, method, sizes[0], 0.05, seed=0)
    assert measured.n_trained == sizes[0].n_trained
    assert (measured.validation, measured.test) != losses(task, task.base.load())


def test_closed_layers_stay_where_they_are() -> None:
    variant = state_variants.Variant("half-open", n_opening_steps=100)
    FEATURES.add("half-open", variant)
    try:
        features = _features_of(variant)
        before = features.angles.detach().clone()
        features(None).sum().backward()
        assert not features.angles.grad[:-1].any()
        assert features.angles.grad[-1].any()
        assert torch.equal(features.angles, before)
    finally:
        FEATURES.remove("half-open")


def _features_of(variant):
    from qpa.generators.generator import layout_of
    from qpa.generators.layout_options import LayoutOptions
    from tests.small_specs import small_spec

    spec = small_spec(3, 4)
    plan = LayoutOptions(generator="state", features=variant.name, control_size=30)
    return variant.build(layout_of(plan, spec, spec.provenance), seed=0, execution=None)


@pytest.fixture
def directions(task: Task, text_file: Path, tmp_path: Path, monkeypatch) -> dict:
    monkeypatch.setattr(state_bases, "LENGTH", 32)
    others = []
    for number, shift in enumerate((3, 11)):
        path = tmp_path / f"other-{number}.txt"
        path.write_text("".join(chr(ord("a") + (ord(c) * 7 + shift) % 26) for c in text_file.read_text()))
        others.append(path)
    return state_bases.shared_directions(task.setting, others)


NAMES_OF_DIRECTIONS = [
    *("1-batch", "kin-8", "other-text", "text-2", "other-texts", "mixture", "mixtures", "weights", "random"),
    *("kin-8+other-text", "weights-signed", "weights-ordered", "weights-turned-2", "other-text-own-1"),
]


@pytest.mark.parametrize("name", NAMES_OF_DIRECTIONS)
@pytest.mark.parametrize("prefix", ["basis", "spectral-basis"])
def test_other_directions_are_others_and_change_nothing_at_first(
    task: Task, directions: dict, prefix: str, name: str
) -> None:
    methods = [state_bases.method(f"{prefix}:{kind}", directions) for kind in ("own", name)]
    own, changed = (attach(task, method) for method in methods)
    assert losses(task, changed.model.eval()) == losses(task, task.base.load())
    a, b = (_basis_of(attached) for attached in (own, changed))
    assert a.shape == b.shape
    assert not torch.allclose(a, b, atol=1e-3)
    if "+" not in name:
        b = b / b.norm(dim=0)
        torch.testing.assert_close(b.T @ b, torch.eye(b.shape[1]), atol=1e-3, rtol=0)


def test_signed_directions_have_the_sign_of_the_gradient_along_them(task: Task, directions: dict) -> None:
    methods = [state_bases.method(f"basis:random{more}", directions) for more in ("", "-signed")]
    plain, signed = (_basis_of(attach(task, method)) for method in methods)
    flips = (plain * signed).sum(0).sign()
    torch.testing.assert_close(plain * flips, signed)
    assert set(flips.tolist()) == {-1.0, 1.0}


def test_directions_that_are_all_turned_are_the_own_ones_within_the_shared_span(
    task: Task, directions: dict
) -> None:
    methods = [state_bases.method(f"basis:{name}", directions) for name in ("own", "own-turned-4")]
    own, turned = (_basis_of(attach(task, method)) for method in methods)
    cosines = torch.nn.functional.cosine_similarity(own[:, :4], turned[:, :4], dim=0)
    torch.testing.assert_close(cosines.abs(), torch.ones(4), atol=0.05, rtol=0)


def test_own_directions_are_as_steep_as_can_be_and_random_ones_are_flat(task: Task, directions: dict) -> None:
    own, mixture, random = (
        state_bases.slope_share_of(task, directions[name]) for name in ("own", "mixture", "random")
    )
    assert own == pytest.approx(1, abs=0.05)
    assert abs(random) < 0.2 < mixture < own


def test_a_name_that_is_none_is_refused(directions: dict) -> None:
    with pytest.raises(ValueError, match="no method is called basis:nothing"):
        state_bases.method("basis:nothing", directions)


def _basis_of(attached: Attached):
    """Return the left vectors of the first module, float[n_out, n]."""
    generator = attached.optimizer.generator  # type: ignore[attr-defined]
    return generator.state_dict()["basis_1"]
