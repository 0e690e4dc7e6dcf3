import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator, get_cosine_schedule_with_warmup

from qpa.adapters.attach import adapter_parameters, attach_adapter, initial_adapter
from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import CheckpointError, DivergedError, ShapeError
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model, load_tokenizer
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from qpa.training.objectives.objective import Splits
from qpa.training.objectives.sft import SFT
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.training_options import TrainingOptions
from tests.ddp_worker import plan_adapter, random_bases, training_rows

LR, ANGLE_LR, N_STEPS = 0.02, 0.04, 3
NOWHERE = PassContext(seed=3, files=DirectoryStore(Path("nowhere")))


class Adapted(NamedTuple):
    """A tiny model with a generated adapter."""

    model: Any
    spec: AdapterSpec
    layout: WeightLayout
    parameters: dict[str, torch.nn.Parameter]
    optimizer: GeneratedAdapterOptimizer


@pytest.fixture(params=["spectral", "aligned"])
def adapt(llama, request):
    """Return a function that makes the same adapted model again and again."""
    spec, layout = plan_adapter(llama, generator=request.param)

    def make(**options):
        model = attach_adapter(load_model(spec.base, keep_dtype=False), spec, kept_rows(layout))
        parameters = adapter_parameters(model, spec)
        options = {"lr": LR, "angle_lr": ANGLE_LR, "eps": 1e-4, **options}
        adapter = [parameters[tensor.path] for tensor in layout.tensors]
        generator = make_generator(layout, 3, random_bases(layout))
        optimizer = GeneratedAdapterOptimizer(adapter, generator, **options)
        return Adapted(model, spec, layout, parameters, optimizer)

    return make


def accumulate(adapted, n_micro_batches=1):
    """Put the mean loss's gradient over all rows into the adapter."""
    adapted.optimizer.zero_grad()
    for rows in training_rows().chunk(n_micro_batches):
        loss = adapted.model(input_ids=rows, labels=rows).loss / n_micro_batches
        loss.backward()


def train(adapted, n_steps=N_STEPS, n_micro_batches=1):
    """Train with the trainers' default schedule: cosine to zero."""
    schedule = get_cosine_schedule_with_warmup(adapted.optimizer, 0, N_STEPS)
    for _ in range(n_steps):
        accumulate(adapted, n_micro_batches)
        adapted.optimizer.step()
        schedule.step()
    return adapted


def adapter_of(adapted):
    return {path: parameter.detach().clone() for path, parameter in adapted.parameters.items()}


def bits(adapted):
    """Return everything a step can change, as bytes."""
    state = adapted.optimizer.state_dict()
    tensors = [*adapted.parameters.values(), *state["generator"].values()]
    for moments in state["inner"]["state"].values():
        tensors.extend(moments.values())
    return [tensor.detach().numpy().tobytes() for tensor in tensors], state["n_steps"]


def assert_same_adapter(found, expected):
    """Compare after `N_STEPS` steps of AdamW, which moved every B by several hundredths."""
    moved = [p for path, p in expected.parameters.items() if "lora_B" in path]
    assert min(float(p.detach().abs().max()) for p in moved) > 0.01
    for path, parameter in expected.parameters.items():
        torch.testing.assert_close(found.parameters[path], parameter, atol=2e-5, rtol=1e-4, msg=path)


# Delta W


def test_delta_w_is_exactly_zero_before_the_first_step(adapt):
    adapted = adapt()
    rows = training_rows()
    with torch.no_grad():
        live = adapted.model(input_ids=rows).logits
        with adapted.model.disable_adapter():
            base = adapted.model(input_ids=rows).logits
    assert torch.equal(live, base)
    for path, parameter in adapted.parameters.items():
        assert bool(parameter.any()) == ("lora_A" in path)


def test_bases_that_come_later_leave_delta_w_zero(adapt):
    adapted = adapt()
    bases = {path: torch.ones(shape) for path, shape in basis_shapes(adapted.layout).items()}
    adapted.optimizer.generator.set_bases(bases)
    adapted.optimizer.push_forward()
    assert bool(bases) == (adapted.layout.generator == "spectral")
    for path, parameter in adapted.parameters.items():
        if "lora_B" in path:
            assert not bool(parameter.any())
        elif path in bases:
            assert torch.equal(parameter[1:], bases[path])


def test_the_first_step_changes_the_function(adapt):
    adapted = train(adapt(), n_steps=1)
    rows = training_rows()
    with torch.no_grad():
        live = adapted.model(input_ids=rows).logits
        with adapted.model.disable_adapter():
            base = adapted.model(input_ids=rows).logits
    assert float((live - base).abs().max()) > 1e-3


def test_the_adapter_is_always_initial_plus_generated(adapt):
    adapted = train(adapt())
    initial = initial_adapter(adapted.spec, kept_rows(adapted.layout))
    outputs = adapted.optimizer.generator()
    for tensor, output in zip(adapted.layout.tensors, outputs, strict=True):
        assert torch.equal(adapted.parameters[tensor.path], initial[tensor.path] + output)


def test_training_lowers_the_loss(adapt):
    adapted, rows = adapt(), training_rows()
    before = float(adapted.model(input_ids=rows, labels=rows).loss.detach())
    for _ in range(10):
        accumulate(adapted)
        adapted.optimizer.step()
    after = float(adapted.model(input_ids=rows, labels=rows).loss.detach())
    assert after < before - 0.1


# The same adapter, whoever trains it


def test_two_runs_give_the_same_bits(adapt):
    assert bits(train(adapt())) == bits(train(adapt()))


@pytest.mark.parametrize("n_micro_batches", [2, 4])
def test_gradient_accumulation_in_a_plain_loop_gives_the_same_adapter(adapt, n_micro_batches):
    assert_same_adapter(train(adapt(), n_micro_batches=n_micro_batches), train(adapt()))


def test_a_closure_gives_the_same_bits(adapt):
    plain, closed = adapt(), adapt()
    accumulate(plain)
    plain.optimizer.step()

    def closure():
        accumulate(closed)
        return 1.5

    assert closed.optimizer.step(closure) == 1.5
    assert bits(closed) == bits(plain)


def trainer_options(n_micro_batches, **options):
    return {
        "max_steps": N_STEPS,
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": len(training_rows()) // n_micro_batches,
        "gradient_accumulation_steps": n_micro_batches,
        **options,
    }


@pytest.mark.parametrize(("n_micro_batches", "checkpointing"), [(1, False), (2, False), (4, True)])
def test_transformers_trainer_gives_the_same_adapter(adapt, tmp_path, n_micro_batches, checkpointing):
    adapted = adapt()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="cosine",
        activation_checkpointing=checkpointing,
        **trainer_options(n_micro_batches),
    )
    rows = [{"input_ids": row, "labels": row} for row in training_rows().tolist()]
    Trainer(
        model=adapted.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        optimizers=(adapted.optimizer, None),
    ).train()
    assert_same_adapter(adapted, train(adapt()))


@pytest.mark.parametrize(("n_micro_batches", "checkpointing"), [(1, False), (4, False), (2, True)])
def test_trl_sft_trainer_gives_the_same_adapter(adapt, tmp_path, n_micro_batches, checkpointing):
    adapted = adapt()
    rows = [{"input_ids": row} for row in training_rows().tolist()]
    SFT(TrainingOptions("text.txt"), load_tokenizer(adapted.spec.base)).trainer(
        adapted.model,
        adapted.optimizer,
        Splits(rows, rows),
        output=tmp_path,
        seed=0,
        activation_checkpointing=checkpointing,
        **trainer_options(n_micro_batches),
    ).train()
    assert adapted.model.get_base_model().is_activation_checkpointing is checkpointing
    assert_same_adapter(adapted, train(adapt()))


def test_clipping_the_adapters_gradient_reaches_the_generator(adapt):
    adapted = adapt(lr=1.0, angle_lr=0.0, eps=1.0)
    adapter = adapted.optimizer.param_groups[0]["params"]
    assert [id(p) for p in adapter] == [id(adapted.parameters[t.path]) for t in adapted.layout.tensors]
    accumulate(adapted)
    norm = torch.nn.utils.clip_grad_norm_(adapter, 1e-6)
    assert float(norm) > 1e-3
    before = [p.detach().clone() for p in adapter]
    adapted.optimizer.step()
    moved = max(float((p.detach() - b).abs().max()) for p, b in zip(adapter, before, strict=True))
    assert 0 < moved < 1e-5


@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e6])
def test_the_generators_own_gradient_is_clipped_after_it_is_pulled_back(adapt, max_grad_norm, monkeypatch):
    """All its numbers together; a gradient that is short enough stays as it is, and so does the adapter's."""

    def gradients(**options):
        adapted = adapt(**options)
        accumulate(adapted)
        adapted.optimizer.step()  # the gradient of the first step is the last layers' alone
        accumulate(adapted)
        kept = [p.grad.clone() for p in adapted.parameters.values() if p.grad is not None]
        found = []
        own = adapted.optimizer.generator.parameters
        monkeypatch.setattr(
            adapted.optimizer.inner, "step", lambda: found.extend(p.grad.clone() for p in own())
        )
        adapted.optimizer.step()
        left = [p.grad for p in adapted.parameters.values() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(kept, left, strict=True))
        return adapted.optimizer, found

    _, whole = gradients(lr=1e-9)
    optimizer, clipped = gradients(lr=1e-9, max_grad_norm=max_grad_norm)
    norm = torch.stack([g.norm() for g in whole]).norm()
    assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)
    scale = min(1.0, max_grad_norm / float(norm))
    for found, expected in zip(clipped, whole, strict=True):
        torch.testing.assert_close(found, expected * scale, rtol=1e-4, atol=1e-9)


def test_a_gradient_scaler_gives_the_same_adapter(adapt):
    plain, scaled = adapt(), adapt()
    accumulate(plain)
    plain.optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rows = training_rows()
    scaler.scale(scaled.model(input_ids=rows, labels=rows).loss).backward()
    scaler.step(scaled.optimizer)
    assert_same_adapter(scaled, plain)


# State


def stored(optimizer):
    """Send a state through a file without pickle's freedom."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def step(adapted, n_steps):
    for _ in range(n_steps):
        accumulate(adapted)
        adapted.optimizer.step()
    return adapted


def test_a_stored_state_resumes_to_the_same_bits(adapt):
    whole, first, second = step(adapt(), 4), step(adapt(), 2), adapt()
    second.optimizer.load_state_dict(stored(first.optimizer))
    assert bits(second) == bits(first)
    assert second.optimizer.n_steps == 2
    assert bits(step(second, 2)) == bits(whole)


def test_a_stored_state_brings_its_learning_rate(adapt):
    first, second = adapt(), adapt(lr=0.5)
    first.optimizer.param_groups[0]["lr"] = 0.125
    second.optimizer.load_state_dict(stored(first.optimizer))
    assert second.optimizer.param_groups[0]["lr"] == 0.125


def test_loading_leaves_the_keys_of_the_state_alone(adapt):
    state = stored(step(adapt(), 1).optimizer)
    keys = set(state)
    adapt().optimizer.load_state_dict(state)
    assert set(state) == keys


@pytest.mark.parametrize("missing", ["generator", "inner", "n_steps"])
def test_a_state_of_another_optimizer_is_refused(adapt, missing):
    state = stored(adapt().optimizer)
    del state[missing]
    with pytest.raises(CheckpointError, match=f"^optimizer state: .* found '{missing}'"):
        adapt().optimizer.load_state_dict(state)


def test_a_state_of_another_generator_is_refused(adapt):
    adapted = adapt()
    layout = PlanLayout(generator=adapted.layout.generator, circuits=2, layers=3).run(adapted.spec, NOWHERE)
    adapter = [torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in layout.tensors]
    other = GeneratedAdapterOptimizer(adapter, make_generator(layout, 3))
    with pytest.raises(
        CheckpointError, match=r"^optimizer state: .* size mismatch for chunk_features.angles"
    ):
        adapted.optimizer.load_state_dict(stored(other))


# Learning rates


@pytest.mark.parametrize(("lr", "angle_lr"), [(0.02, 0.04), (0.02, 0.005), (0.02, 0.0)])
def test_the_outer_learning_rate_reaches_both_inner_groups_with_their_ratio(adapt, lr, angle_lr):
    adapted = adapt(lr=lr, angle_lr=angle_lr)
    for share in (1.0, 0.5, 0.0):
        adapted.optimizer.param_groups[0]["lr"] = lr * share
        step(adapted, 1)
        decoders, angles = adapted.optimizer.inner.param_groups
        assert decoders["lr"] == pytest.approx(lr * share)
        assert angles["lr"] == pytest.approx(angle_lr * share)
    assert angles["params"] == [adapted.optimizer.generator.chunk_features.angles]


def test_a_learning_rate_of_zero_moves_nothing(adapt):
    adapted = step(adapt(), 1)
    before = adapter_of(adapted)
    adapted.optimizer.param_groups[0]["lr"] = 0.0
    step(adapted, 1)
    assert all(torch.equal(parameter, before[path]) for path, parameter in adapted.parameters.items())


def test_an_angle_learning_rate_of_zero_freezes_the_angles(adapt):
    frozen, free = adapt(angle_lr=0.0, weight_decay=0.1), adapt()
    start = frozen.optimizer.generator.chunk_features.angles.detach().clone()
    train(frozen)
    train(free)
    assert torch.equal(frozen.optimizer.generator.chunk_features.angles, start)
    assert not torch.equal(free.optimizer.generator.chunk_features.angles, start)
    assert any(bool(p.any()) for path, p in frozen.parameters.items() if "lora_B" in path)


def test_weight_decay_is_for_decoders_only(adapt):
    decoders, angles = adapt(weight_decay=0.25).optimizer.inner.param_groups
    assert (decoders["weight_decay"], angles["weight_decay"]) == (0.25, 0.0)
    assert len(decoders["params"]) == len(adapt().layout.groups)


# Gradients that are not there, or not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(adapt, value):
    adapted = step(adapt(), 2)
    before = bits(adapted)
    accumulate(adapted)
    list(adapted.parameters.values())[3].grad[1, 0] = value
    with pytest.raises(DivergedError, match=r"^step 3: expected a finite gradient, found NaN or infinity"):
        adapted.optimizer.step()
    assert bits(adapted) == before


def test_training_goes_on_after_a_gradient_that_is_not_finite(adapt):
    adapted = step(adapt(), 1)
    accumulate(adapted)
    next(iter(adapted.parameters.values())).grad.fill_(float("nan"))
    with pytest.raises(DivergedError):
        adapted.optimizer.step()
    assert bits(step(adapted, 1)) == bits(step(adapt(), 2))


def test_an_infinite_pull_back_of_a_finite_gradient_changes_nothing(adapt):
    adapted = step(adapt(), 1)
    with torch.no_grad():
        for decoder in adapted.optimizer.generator.decoders:
            decoder.weights[-1].fill_(1e30)
    adapted.optimizer.push_forward()
    before = bits(adapted)
    adapted.optimizer.zero_grad()
    for parameter in adapted.parameters.values():
        parameter.grad = torch.full_like(parameter, 1e10)
    with pytest.raises(DivergedError):
        adapted.optimizer.step()
    assert bits(adapted) == before


def forget(adapted, paths):
    for path in paths:
        adapted.parameters[path].grad = None


def erase(adapted, paths):
    for path in paths:
        adapted.parameters[path].grad.zero_()


def paths_of(adapted, which):
    tensors = adapted.layout.tensors
    groups = adapted.layout.groups
    chosen = {"one tensor": tensors[:1], "one group": groups[1].tensors, "all": tensors}[which]
    return [tensor.path for tensor in chosen]


@pytest.mark.parametrize("n_steps_before", [0, 2])
@pytest.mark.parametrize("which", ["one tensor", "one group", "all"])
def test_a_missing_gradient_counts_as_zero(adapt, which, n_steps_before):
    missing, zero = (step(adapt(weight_decay=0.1), n_steps_before) for _ in range(2))
    for adapted, change in ((missing, forget), (zero, erase)):
        accumulate(adapted)
        change(adapted, paths_of(adapted, which))
        adapted.optimizer.step()
    assert_equal_adapters(missing, zero)
    assert_equal_adapters(step(missing, 1), step(zero, 1))


def assert_equal_adapters(found, expected):
    for path, parameter in expected.parameters.items():
        assert torch.equal(found.parameters[path], parameter), path


# Shapes


def make_optimizer(layout, adapter):
    return GeneratedAdapterOptimizer(adapter, make_generator(layout, 0))


def zeros(layout):
    return [torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in layout.tensors]


def test_an_adapter_of_another_shape_is_refused(llama):
    _, layout = plan_adapter(llama)
    adapter = zeros(layout)
    adapter[2] = torch.nn.Parameter(torch.zeros(3, 5))
    path = re.escape(layout.tensors[2].path)
    with pytest.raises(ShapeError, match=rf"^{path}: expected \(\d+, \d+\), found \(3, 5\)$"):
        make_optimizer(layout, adapter)
    with pytest.raises(ShapeError, match=rf"^{re.escape(layout.tensors[0].path)}: expected"):
        make_optimizer(layout, zeros(layout)[::-1])


def test_an_adapter_of_another_length_is_refused(llama):
    _, layout = plan_adapter(llama)
    n_tensors = len(layout.tensors)
    for adapter in (zeros(layout)[:-1], [*zeros(layout), torch.nn.Parameter(torch.zeros(1, 1))], []):
        with pytest.raises(ShapeError, match=f"{n_tensors} tensors.*found {len(adapter)} tensors"):
            make_optimizer(layout, adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_of_another_dtype_is_refused(llama, dtype):
    _, layout = plan_adapter(llama)
    adapter = zeros(layout)
    adapter[0] = torch.nn.Parameter(adapter[0].detach().to(dtype))
    with pytest.raises(ShapeError, match=f"expected float32 parameters, found .*{dtype}"):
        make_optimizer(layout, adapter)


def test_a_callers_autocast_does_not_reach_the_generator(adapt):
    plain, autocast = adapt(), adapt()
    for adapted, enabled in ((plain, False), (autocast, True)):
        for parameter in adapted.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 0.25)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(3):
                adapted.optimizer.step()
    for left, right in zip(*(a.optimizer.param_groups[0]["params"] for a in (plain, autocast)), strict=True):
        assert torch.equal(left, right)


def test_there_is_no_room_for_other_parameters(adapt):
    with pytest.raises(ShapeError, match="further param group"):
        adapt().optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
