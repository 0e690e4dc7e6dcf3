"""quantum-peft: its count, its start, its training and export, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qpa.adapters.attach import initial_adapter
from qpa.documents import ParentAdapter, WeightLayout
from qpa.errors import OptionError
from qpa.generators.chunks import kept_rows
from qpa.generators.generator import make_generator
from qpa.passes.plan_layout import PlanLayout
from tests.small_specs import NOWHERE, small_spec, spec_of
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

SPEC = small_spec(2, 2)
PLAN = PlanLayout(generator="quantum-peft")


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_module_trains_the_papers_number_of_parameters(n_layers, rank):
    """2 ((2L+1) log2 N - 2L) + K for a square weight whose side is a power of two."""
    account = replace(PLAN, layers=n_layers).run(spec_of([("0.q", 1024, 1024)], rank), NOWHERE).account
    assert (account.n_angles, account.n_own) == (2 * ((2 * n_layers + 1) * 10 - 2 * n_layers), rank)


def test_sides_may_differ_and_be_no_powers_of_two():
    account = PLAN.run(spec_of([("0.up", 64, 172)], 4), NOWHERE).account
    assert (account.n_angles, account.n_own) == (16 + 2 * 19, 4)


def test_rows_are_orthonormal_and_columns_are_so_times_their_factors():
    generator = make_generator(PLAN.run(SPEC, NOWHERE), 0)
    factors = torch.tensor([2.0, -0.5])
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("factors"):
                parameter.copy_(factors)
        for shape, tensor in zip(generator.layout.tensors, generator(), strict=True):
            squares = tensor @ tensor.mT if "lora_A" in shape.path else tensor.mT @ tensor
            expected = torch.eye(2) if "lora_A" in shape.path else torch.diag(factors.square())
            torch.testing.assert_close(squares, expected)


def test_nothing_is_changed_before_the_first_step_and_rows_are_the_circuits_alone():
    layout = PLAN.run(SPEC, NOWHERE)
    initial = initial_adapter(SPEC, kept_rows(layout))
    assert not any(bool(tensor.any()) for tensor in initial.values())
    generated = dict(zip((t.path for t in layout.tensors), make_generator(layout, 0)(), strict=True))
    assert {path for path, tensor in generated.items() if bool(tensor.any())} == {
        a.path for a, _ in SPEC.pairs
    }


def test_a_dora_keeps_its_magnitudes(llama, tmp_path):
    run = plan(llama, tmp_path / "run", inspect={"method": "dora"}, generator="quantum-peft", circuits=None)
    layout = run.read(WeightLayout)
    assert {tensor.path.rpartition(".")[2] for tensor in layout.kept} == {"lora_magnitude_vector"}


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"circuits": 2}, SPEC, "circuits: expected no such option with `generator` quantum-peft"),
        ({"features": "classical"}, SPEC, "features: expected no such option"),
        ({"ansatz": "ry-cz-ring"}, SPEC, "ansatz: expected no such option"),
        ({"vectors": ("q_proj",)}, SPEC, "vectors: expected no such option .*, found q_proj"),
        ({"spectrum": False}, SPEC, "spectrum: expected no such option"),
        ({"layers": 0}, SPEC, "layers: expected a whole number of at least 1"),
        ({"layers": 2, "max_params": "99"}, SPEC, "max_params: expected no `layers`, which it would choose"),
        ({"max_params": "9"}, SPEC, "max_params: expected at least 192, found 9"),
        ({}, spec_of([("0.q", 8, 1)], 1), "targets: expected sides of at least 2 .* found 1"),
        (
            {},
            SPEC.model_copy(update={"parent": ParentAdapter.model_construct()}),
            "generator: expected a generator that can go on from an adapter, .*export it merged",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, spec, message):
    with pytest.raises(OptionError, match=message):
        replace(PLAN, **options).run(spec, NOWHERE)


def test_a_budget_chooses_the_layers():
    layout = replace(PLAN, max_params="300").run(SPEC, NOWHERE)
    assert layout.account.n_generator <= 300
    (chosen,) = [size for size in layout.sizes if size.is_chosen]
    n_layers = dict(layout.parametrized[0].sizes)["layers"]
    assert n_layers > 1 and chosen.words == f"layers {n_layers}"
    assert replace(PLAN, layers=n_layers + 1).run(SPEC, NOWHERE).account.n_generator > 300


def test_resumed_training_ends_in_the_same_bits_and_every_tensor_has_moved(
    llama, text_file, tmp_path, monkeypatch
):
    options = {"generator": "quantum-peft", "circuits": None}
    whole, halved = (plan(llama, tmp_path / name, **options) for name in ("whole", "halved"))
    frozen = train(whole, text_file)
    assert frozen.result.eval_loss < frozen.result.base_loss
    assert frozen.generator == "quantum-peft"
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(halved, text_file)
    monkeypatch.undo()
    train(halved, text_file, resume=True)
    assert same_bits(tensors(halved), tensors(whole))
    start = make_generator(whole.read(WeightLayout), 0)()
    paths = [tensor.path for tensor in whole.read(WeightLayout).tensors]
    moved = [not torch.equal(tensors(whole)[path], tensor) for path, tensor in zip(paths, start, strict=True)]
    assert all(moved)


def test_from_plan_to_verified_exports(llama, text_file, tmp_path, cli, in_process):
    run = tmp_path / "run"
    plan_options = ("--generator", "quantum-peft", "--rank", 2, "--layers", 2)
    code, out, err = cli("plan", "--model", llama, *plan_options, "--out", run)
    assert code == 0, err
    assert "scaled-orthogonal-columns, layers 2" in out and "none to measure" in out
    code, _, err = cli("train", run, "--data", text_file, "--max-steps", 3, "--max-length", 32)
    assert code == 0, err
    for name in ("lora", "merged"):
        code, _, err = cli("export", run, "--format", name, "--out", tmp_path / name)
        assert code == 0, err
        code, out, err = cli("verify", tmp_path / name, "--model", llama)
        assert code == 0, err
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "columns of small orthogonal quantum circuits" in card and "| circuit angles |" in card
    assert cli("verify", run)[0] == 0
    code, out, _ = cli("inspect", run, "--gradients")
    assert code == 0 and "gradients: none, since the run has no circuits" in out
    refusal = cli.refuses("noise", run, "--out", tmp_path / "noise")
    assert "--generator: expected circuits, which can be measured, found quantum-peft" in refusal
    code, _, err = cli("report", run)
    assert code == 0, err
    assert "no circuit that is measured" in (run / "report.html").read_text()
