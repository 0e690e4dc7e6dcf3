"""direct: the adapter's own numbers, for every kind of adapter, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qpa.adapters.registry import KINDS
from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import OptionError
from qpa.generators.direct import DIRECT
from qpa.generators.generator import make_generator
from qpa.passes.plan_layout import PlanLayout
from qpa.training.optimizer import GeneratedAdapterOptimizer
from tests.small_specs import NOWHERE, small_spec
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

SPEC = small_spec(2, 2)
PLAN = PlanLayout(generator="direct")


@pytest.mark.parametrize("method", [*KINDS])
def test_every_number_of_every_kind_of_adapter_is_trained(llama, tmp_path, method):
    inspect = {"method": method} if KINDS[method].has_rank else {"method": method, "rank": None}
    run = plan(llama, tmp_path / "run", inspect=inspect, generator="direct", circuits=None, layers=None)
    layout, spec = run.read(WeightLayout), run.read(AdapterSpec)
    assert layout.account.n_own == layout.account.n_generator == spec.n_numbers
    assert not layout.kept and not layout.features.has_circuits
    assert not any(bool(tensor.any()) for tensor in make_generator(layout, 0)())


def test_a_step_is_that_of_adamw_on_the_adapter_itself():
    layout = PLAN.run(SPEC, NOWHERE)
    random = torch.Generator().manual_seed(3)
    initial = [torch.randn(tensor.shape, generator=random) for tensor in layout.tensors]
    adapter, plain = ([torch.nn.Parameter(tensor.clone()) for tensor in initial] for _ in range(2))
    optimizer = GeneratedAdapterOptimizer(adapter, make_generator(layout, 0), lr=0.1)
    assert all(map(torch.equal, adapter, initial))
    reference = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for one, other in zip(adapter, plain, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(adapter, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_params": "99"}, "max_params: expected no budget with `generator` direct, whose size .*`rank`"),
        (
            {"layers": 2},
            "layers: expected no such option with `generator` direct, which has no chunks, found 2",
        ),
        ({"chunk_size": 64}, "chunk_size: expected no such option"),
        ({"windows": False}, "windows: expected no such option .* found False"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        replace(PLAN, **options).run(SPEC, NOWHERE)


@pytest.mark.parametrize(
    ("method", "rate"), [("lora", 1e-2), ("dora", 1e-2), ("ia3", 1e-1), ("prefix", 1e-1), ("ffa", 3e-2)]
)
def test_the_rate_is_that_at_which_the_kinds_own_numbers_train_well(method, rate):
    assert DIRECT.rate(SPEC.model_copy(update={"method": method})) == rate


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_resumed_training_ends_in_the_same_bits(llama, text_file, tmp_path, monkeypatch, method):
    inspect = {"method": method} if KINDS[method].has_rank else {"method": method, "rank": None}
    options = {"generator": "direct", "circuits": None, "layers": None, "inspect": inspect}
    whole, halved = (plan(llama, tmp_path / name, **options) for name in ("whole", "halved"))
    frozen = train(whole, text_file)
    assert frozen.result.eval_loss < frozen.result.base_loss
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(halved, text_file)
    monkeypatch.undo()
    train(halved, text_file, resume=True)
    assert same_bits(tensors(halved), tensors(whole))


def test_the_card_of_a_verified_export_says_that_there_is_no_generator(
    llama, text_file, tmp_path, cli, in_process
):
    run, out = tmp_path / "run", tmp_path / "peft"
    assert cli("plan", "--model", llama, "--method", "ia3", "--generator", "direct", "--out", run)[0] == 0
    assert cli("train", run, "--data", text_file, "--max-steps", 2, "--max-length", 32)[0] == 0
    assert cli("export", run, "--format", "peft", "--out", out)[0] == 0
    code, _, err = cli("verify", out, "--model", llama)
    assert code == 0, err
    card = (out / "README.md").read_text()
    assert "trained one by one, without a generator" in card and "| own numbers |" in card
    assert "circuit" not in card
