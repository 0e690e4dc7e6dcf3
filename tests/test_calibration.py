from pathlib import Path

import pytest
import torch

from qpa.adapters.attach import adapter_parameters, attach_adapter, set_adapter
from qpa.errors import DivergedError
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.models.base_model import load_model
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from qpa.training.calibration import choose_rows, gradient_bases
from qpa.training.data.data_options import N_CALIBRATION_BATCHES

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))
N_EXACT = 8
"""Directions to compare: those whose singular values lie well apart from the next."""


def batches():
    """Return two batches of 2 x 12 tokens."""
    rows = torch.randint(1, 256, (2, 2, 12), generator=torch.Generator().manual_seed(1))
    return list(rows)


class Attached:
    """A tiny model with an adapter at its initial values, and its loss."""

    def __init__(self, path, plan=None, **inspect):
        self.spec = InspectModel(model=str(path), **inspect).run(None, NOWHERE)
        self.layout = (plan or PlanLayout(vectors=("none",))).run(self.spec, NOWHERE)
        self.model = attach_adapter(
            load_model(self.spec.base, keep_dtype=False), self.spec, kept_rows(self.layout)
        )
        self.model.eval()
        self.parameters = adapter_parameters(self.model, self.spec)
        # lora_B's bases are divided by this, so that factors are singular values of delta W.
        self.scale = self.spec.alpha / self.spec.rank

    def loss(self, rows):
        return self.model(input_ids=rows, labels=rows).loss

    def bases(self, loss=None):
        return gradient_bases(
            self.parameters, self.spec, basis_shapes(self.layout), loss or self.loss, batches()
        )


def dense_gradients(attached):
    """Return the gradient of each base weight, float32[out, in], by the path of its module."""
    model = load_model(attached.spec.base, keep_dtype=False).eval()
    modules = {tensor.module: model.get_submodule(tensor.module) for tensor in attached.spec.tensors}
    for module in modules.values():
        module.weight.requires_grad_(True)
    for rows in batches():
        model(input_ids=rows, labels=rows).loss.backward()
    is_conv1d = attached.spec.fan_in_fan_out
    return {path: m.weight.grad.T if is_conv1d else m.weight.grad for path, m in modules.items()}


# Each with the smallest side for a rank, where the range finder is exact.
MODELS = {
    "llama": {"targets": ("k_proj", "v_proj"), "rank": 32},
    "gpt2": {"targets": ("c_fc", "c_attn", "c_proj"), "rank": 64},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_bases_are_the_singular_vectors_of_the_gradient(request, name):
    attached = Attached(request.getfixturevalue(name), **MODELS[name])
    bases, dense = attached.bases(), dense_gradients(attached)
    assert bases.keys() == {tensor.path for tensor in attached.spec.tensors}
    for module, gradient in dense.items():
        v, u = bases[f"{module}.lora_A.weight"], attached.scale * bases[f"{module}.lora_B.weight"]
        exact_u, values, exact_v = torch.linalg.svd(gradient, full_matrices=False)
        for i in range(N_EXACT):
            cosine_u, cosine_v = float(u[:, i] @ exact_u[:, i]), float(v[i] @ exact_v[i])
            gap = min(abs(float(values[i] / values[j]) - 1) for j in {max(i - 1, 0), i + 1} - {i})
            if gap > 0.05:
                assert abs(cosine_u) > 0.999 and abs(cosine_v) > 0.999, (module, i, gap)
                assert cosine_u * cosine_v > 0
            # Whatever the gap: up the slope, and as steep as the exact pair.
            slope = float(u[:, i] @ gradient @ v[i])
            assert slope == pytest.approx(float(values[i]), rel=1e-3), (module, i)


@pytest.mark.parametrize("name", MODELS)
def test_the_bases_are_orthonormal_and_have_the_layouts_shapes(request, name):
    attached = Attached(request.getfixturevalue(name), **{**MODELS[name], "rank": 12})
    bases = attached.bases()
    assert {path: tuple(basis.shape) for path, basis in bases.items()} == basis_shapes(attached.layout)
    for path, basis in bases.items():
        product = basis @ basis.T if "lora_A" in path else attached.scale**2 * basis.T @ basis
        torch.testing.assert_close(product, torch.eye(12), atol=1e-4, rtol=0, msg=path)


def test_a_small_rank_finds_most_of_the_steepest_directions(llama):
    attached = Attached(llama, PlanLayout(), rank=16)
    bases, dense = attached.bases(), dense_gradients(attached)
    for module, gradient in dense.items():
        v, u = bases[f"{module}.lora_A.weight"], attached.scale * bases[f"{module}.lora_B.weight"]
        assert v.shape[0] == u.shape[1] == 15
        values = torch.linalg.svdvals(gradient)
        slopes = (u.T @ gradient @ v.T).diagonal()
        assert float(slopes[0]) > 0.7 * float(values[0])
        assert bool((slopes > 0).all())


def test_a_step_against_a_direction_lowers_the_loss(llama):
    attached = Attached(llama, rank=16)
    bases = attached.bases()
    for module in dict.fromkeys(tensor.module for tensor in attached.spec.tensors):
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        losses = []
        for step in (-0.01, 0.0, 0.01):
            values = {path: torch.zeros_like(p) for path, p in attached.parameters.items()}
            values[a][0], values[b][:, 0] = bases[a][0], step * bases[b][:, 0]
            set_adapter(attached.parameters, values)
            with torch.no_grad():
                losses.append(float(sum(attached.loss(rows) for rows in batches())))
        assert losses[0] < losses[1] < losses[2], module


def test_the_adapter_is_left_as_it_was(llama):
    attached = Attached(llama, PlanLayout(), rank=4)
    for parameter in attached.parameters.values():
        torch.nn.init.normal_(parameter)
    before = {path: parameter.detach().clone() for path, parameter in attached.parameters.items()}
    attached.bases()
    assert all(torch.equal(parameter, before[path]) for path, parameter in attached.parameters.items())
    assert all(parameter.grad is None for parameter in attached.parameters.values())


def test_the_adapter_is_left_as_it_was_when_the_loss_fails(llama):
    attached = Attached(llama, PlanLayout(), rank=4)
    before = {path: parameter.detach().clone() for path, parameter in attached.parameters.items()}

    def fail(rows):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attached.bases(fail)
    assert all(torch.equal(parameter, before[path]) for path, parameter in attached.parameters.items())


def test_bases_do_not_depend_on_what_the_adapter_holds_or_on_the_global_random_state(llama):
    first, second = (Attached(llama, PlanLayout(), rank=4) for _ in range(2))
    torch.manual_seed(7)
    for parameter in second.parameters.values():
        torch.nn.init.normal_(parameter)
    found, again = first.bases(), second.bases()
    assert all(torch.equal(found[path], again[path]) for path in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(llama, value):
    attached = Attached(llama, PlanLayout(), rank=4)
    with pytest.raises(DivergedError, match="expected a finite gradient before training, found NaN or inf"):
        attached.bases(lambda rows: attached.loss(rows) * value)


def test_a_layout_without_spectra_reads_no_gradient(llama):
    for plan in (PlanLayout(generator="aligned"), PlanLayout(spectrum=False)):
        attached = Attached(llama, plan, rank=4)
        assert attached.bases(lambda rows: pytest.fail("the model ran")) == {}


def test_a_weight_without_gradient_gets_some_orthonormal_directions(llama):
    attached = Attached(llama, rank=4)
    bases = attached.bases(lambda rows: 0.0 * attached.loss(rows))
    assert all(bool(torch.isfinite(basis).all()) for basis in bases.values())


def test_rows_are_chosen_once_each_and_few():
    chosen = choose_rows(1000, 4, seed=3)
    assert [len(batch) for batch in chosen] == [4] * N_CALIBRATION_BATCHES
    rows = [row for batch in chosen for row in batch]
    assert len(set(rows)) == len(rows) and all(0 <= row < 1000 for row in rows)
    assert chosen == choose_rows(1000, 4, seed=3) != choose_rows(1000, 4, seed=4)
    assert sorted(row for batch in choose_rows(10, 4, seed=3) for row in batch) == list(range(10))
    assert [len(batch) for batch in choose_rows(10, 4, seed=3)] == [4, 4, 2]
