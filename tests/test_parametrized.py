"""Tensors that come of numbers of their own: how they are drawn, built, grouped, and mixed with chunks."""

from __future__ import annotations

import pytest
import torch

from qpa.documents import account_of
from qpa.errors import ShapeError
from qpa.generators.chunks import kept_rows
from qpa.generators.generator import make_generator
from qpa.generators.parametrizations.kind import parametrized
from qpa.passes.plan_layout import PlanLayout
from qpa.training.optimizer import GeneratedAdapterOptimizer
from tests.small_specs import NOWHERE, small_spec, spec_of

SPEC = small_spec(2, 2)
DIRECT = PlanLayout(generator="direct")
QUANTUM_PEFT = PlanLayout(generator="quantum-peft")


def by_path(generator):
    shapes = generator.layout.tensors
    return {shape.path: tensor for shape, tensor in zip(shapes, generator(), strict=True)}


@pytest.mark.parametrize("plan", [DIRECT, QUANTUM_PEFT], ids=["direct", "quantum-peft"])
def test_a_generator_trains_what_the_account_says_and_gives_every_tensor_its_shape(plan):
    layout = plan.run(SPEC, NOWHERE)
    generator = make_generator(layout, 0)
    groups = {group.name: sum(p.numel() for p in group.parameters) for group in generator.parameter_groups()}
    account = layout.account
    assert groups.get("angles", 0) == account.n_angles and groups["own numbers"] == account.n_own
    assert sum(groups.values()) == sum(p.numel() for p in generator.parameters()) == account.n_generator
    assert [tuple(tensor.shape) for tensor in generator()] == [tensor.shape for tensor in layout.tensors]
    assert generator.run() is None and generator.connect(None) is None


def test_what_is_drawn_depends_on_the_seed_and_the_path_alone():
    one, other, few = (
        by_path(make_generator(QUANTUM_PEFT.run(spec, NOWHERE), seed))
        for spec, seed in ((SPEC, 0), (SPEC, 1), (small_spec(1, 2), 0))
    )
    assert all(torch.equal(few[path], one[path]) for path in few)
    rows = [path for path in few if "lora_A" in path]
    assert not any(torch.equal(one[path], other[path]) for path in rows)
    assert len({tuple(one[path].detach().ravel()[:8].tolist()) for path in rows}) == len(rows)


def test_a_layout_may_have_chunks_and_other_tensors():
    aligned = PlanLayout(generator="aligned", circuits=2).run(
        spec_of([("0.q", 4, 4), ("1.q", 4, 4)], 2), NOWHERE
    )
    more = spec_of([("0.up", 4, 6)], 2).tensors
    tensors = tuple(parametrized(tensor, "numbers") for tensor in more)
    account = account_of(aligned.features, aligned.ansatz, aligned.groups, tensors, ())
    mixed = type(aligned).model_validate(
        dict(aligned) | {"parametrized": tensors, "account": account, "provenance": aligned.provenance}
    )
    generator = make_generator(mixed, 0)
    assert sum(p.numel() for p in generator.parameters()) == account.n_generator
    assert account.n_own == 2 * (4 + 6)
    adapter = [torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in mixed.tensors]
    optimizer = GeneratedAdapterOptimizer(adapter, generator, lr=0.1)
    for parameter in adapter:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(bool(parameter.any()) for parameter in adapter)
    state = optimizer.state_dict()
    again = GeneratedAdapterOptimizer(
        [torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in mixed.tensors], make_generator(mixed, 1)
    )
    again.load_state_dict(state)
    assert all(map(torch.equal, again._adapter, adapter))


def test_only_what_takes_the_initial_values_place_starts_at_zero():
    assert kept_rows(DIRECT.run(SPEC, NOWHERE)) == {}
    assert kept_rows(QUANTUM_PEFT.run(SPEC, NOWHERE)) == {tensor.path: 0 for tensor in SPEC.tensors}


def test_a_layout_that_counts_wrong_is_refused():
    layout = DIRECT.run(SPEC, NOWHERE)
    first = layout.parametrized[0].model_copy(update={"n_own": 5})
    with pytest.raises(ShapeError, match=r"expected .* trained numbers, found"):
        make_generator(layout.model_copy(update={"parametrized": (first, *layout.parametrized[1:])}), 0)
