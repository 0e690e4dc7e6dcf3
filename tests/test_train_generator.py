"""train-generator and freeze-adapter on a tiny Llama."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qpa.adapters.attach import adapter_parameters
from qpa.documents import (
    AdapterSpec,
    FrozenAdapter,
    LogicalCircuit,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.documents.base import digest_of
from qpa.errors import CheckpointError, DataError, DivergedError, DocumentError, ModelError, OptionError
from qpa.models.base_model import load_model
from qpa.passes import planning_pipeline, training_pipeline
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import METRICS, RunDirectory
from qpa.training import session as module
from qpa.training.fitting import Fitted
from qpa.training.preparation import Session, learning_rates

STEPS = 6


def plan(
    model: Path, out: Path, *, seed: int = 0, inspect: dict[str, Any] | None = None, **layout: Any
) -> RunDirectory:
    pipeline = planning_pipeline(
        InspectModel(str(model), **{"rank": 2, **(inspect or {})}),
        PlanLayout(**{"circuits": 2, "layers": 2, **layout}),
        TranspileCircuit(),
    )
    out.mkdir(parents=True)
    run = RunDirectory(out)
    pipeline.run(None, PassContext(seed, run.files), run.write)
    return run


def train(run: RunDirectory, data: Path, *, seed: int = 0, **options: Any) -> FrozenAdapter:
    documents = run.read_through(LogicalCircuit)
    step = TrainGenerator(
        **{
            "data": str(data),
            "max_steps": STEPS,
            "max_length": 32,
            "batch_size": 2,
            "save_steps": 3,
            "device": "cpu",
        }
        | options
    )
    context = PassContext(seed, run.files, documents)
    return training_pipeline(step).run(documents[-1], context, run.write).document(FrozenAdapter)


def tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.files.get(run.read(FrozenAdapter).arrays))


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trained(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = plan(llama, tmp_path_factory.mktemp("trained") / "run")
    train(run, text_file)
    return run


def test_training_lowers_the_loss_and_moves_every_adapter_tensor_of_b(trained: RunDirectory) -> None:
    result = trained.read(FrozenAdapter).result
    assert result.n_steps == STEPS
    assert result.eval_loss < result.base_loss
    assert all(bool(tensor.any()) for path, tensor in tensors(trained).items() if ".lora_B" in path)


def test_metrics_have_both_learning_rates_and_both_evaluations(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = plan(llama, tmp_path / "run")
    frozen = train(run, text_file, max_steps=10, angle_lr=6e-3, lr=3e-3)
    lines = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]
    assert (lines[0]["step"], lines[0]["eval_loss"]) == (0, frozen.result.base_loss)
    assert lines[0]["eval_perplexity"] == pytest.approx(math.exp(frozen.result.base_loss))
    assert lines[-1]["eval_loss"] == frozen.result.eval_loss
    assert lines[1]["angle_learning_rate"] == pytest.approx(2 * lines[1]["learning_rate"])


@pytest.mark.parametrize(
    ("features", "gradient", "n_runs_of_a_circuit"),
    [
        ("circuit", "adjoint", 1),
        ("circuit", "parameter-shift", 1 + 2 * 12),
        ("random", "parameter-shift", 1),
        ("bits", "adjoint", 0),
    ],
)
def test_metrics_begin_with_what_a_step_costs(
    llama: Path, text_file: Path, tmp_path: Path, features: str, gradient: str, n_runs_of_a_circuit: int
) -> None:
    run = plan(llama, tmp_path / "run", features=features)
    ansatz = run.read(WeightLayout).ansatz
    assert (ansatz.n_angles, ansatz.n_layers) == (12, 2)
    train(run, text_file, max_steps=1, gradient=gradient)
    first = json.loads((run.path / METRICS).read_text().splitlines()[0])
    assert first["step_circuits"] == first["step_executions"] == 2 * n_runs_of_a_circuit


@pytest.mark.parametrize(
    ("method", "generator", "default"),
    [
        ("llama", "spectral", 2e-2),
        ("llama", "aligned", 3e-3),
        ("llama", "paper", 1e-3),
        ("ia3", "aligned", 1e-1),
        ("prefix", "aligned", 1e-1),
        ("ffa", "aligned", 3e-2),
        ("ffa", "paper", 1e-3),
    ],
)
@pytest.mark.parametrize("given", [{}, {"lr": 0.5}, {"angle_lr": 0.25}, {"lr": 0.5, "angle_lr": 0.0}])
def test_learning_rates_are_those_given_or_those_that_suit_the_generator(
    method: str, generator: str, default: float, given: dict[str, float]
) -> None:
    golden = Path(__file__).parent / "golden"
    layout_file = golden / "weight-layout-2" / f"{generator}.json"
    layout = WeightLayout.from_json(layout_file.read_bytes(), layout_file.name)
    spec_file = golden / "adapter-spec-2" / f"{method}.json"
    spec = AdapterSpec.from_json(spec_file.read_bytes(), spec_file.name)
    lr, angle_lr = learning_rates(TrainGenerator(data="text.txt", **given), spec, layout)
    assert lr == given.get("lr", default)
    assert angle_lr == given.get("angle_lr", lr)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    trained: RunDirectory, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    again = plan(llama, tmp_path / "again")
    assert train(again, text_file) == trained.read(FrozenAdapter)
    other = plan(llama, tmp_path / "other", seed=1)
    train(other, text_file, seed=1)
    assert not same_bits(tensors(other), tensors(trained))


def test_frozen_tensors_are_the_live_models_bit_for_bit(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = module.record

    def spy(session: Session, *rest: Any) -> TrainedGenerator:
        seen.append(session)
        return original(session, *rest)

    monkeypatch.setattr(module, "record", spy)
    run = plan(llama, tmp_path / "run")
    train(run, text_file)
    live = adapter_parameters(seen[0].adapted.model, run.read(AdapterSpec))
    assert same_bits({path: parameter.detach() for path, parameter in live.items()}, tensors(run))


@pytest.mark.parametrize(("interrupted_at", "grad_accum"), [(3, 1), (3, 2), (6, 1)])
def test_resumed_training_ends_in_the_same_bits(
    gpt2: Path,
    text_file: Path,
    tmp_path: Path,
    interrupted_at: int,
    grad_accum: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-2 has dropout, and 9 steps pass over the data more than once: both must be resumed too."""
    options = {"max_steps": 9, "batch_size": 12, "grad_accum": grad_accum}
    whole = plan(gpt2, tmp_path / "whole")
    train(whole, text_file, **options)
    halved = plan(gpt2, tmp_path / "halved")
    interrupt_after(monkeypatch, interrupted_at)
    with pytest.raises(KeyboardInterrupt):
        train(halved, text_file, **options)
    monkeypatch.undo()
    train(halved, text_file, **options, resume=True)
    assert same_bits(tensors(whole), tensors(halved))
    assert whole.read(FrozenAdapter) == halved.read(FrozenAdapter)


def test_resuming_a_finished_training_changes_nothing(
    trained: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path)
    before = (run.read(FrozenAdapter), (run.path / METRICS).read_text())
    assert sorted((run.path / "checkpoints").iterdir())[-1].name == f"step-{STEPS:08d}"
    train(run, text_file, resume=True)
    assert (run.read(FrozenAdapter), (run.path / METRICS).read_text()) == before


def test_resuming_takes_the_bases_from_the_checkpoint(
    trained: RunDirectory, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan(llama, tmp_path / "run")
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(run, text_file)
    monkeypatch.undo()
    monkeypatch.setattr(
        "qpa.training.generated_adapter.gradient_bases", lambda *_: pytest.fail("the gradient was read again")
    )
    train(run, text_file, resume=True)
    assert same_bits(arrays(run), arrays(trained))
    assert same_bits(tensors(run), tensors(trained))
    bases = [tensor for name, tensor in arrays(run).items() if name.startswith("basis_")]
    assert len(bases) == 2 * 7 * 2
    assert all(bool(basis.any()) for basis in bases)


def arrays(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.files.get(run.read(TrainedGenerator).arrays))


@pytest.mark.parametrize(
    "options", [{}, {"circuits": None}, {"features": "random"}, {"features": "classical"}]
)
def test_before_the_first_step_the_bases_are_there_and_the_function_is_the_base_models(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen: list[Any] = []
    original = module.fit

    def spy(session: Session, *rest: Any) -> Fitted:
        ids, model = torch.arange(1, 33)[None], session.adapted.model.eval()
        with torch.no_grad():
            live = model(input_ids=ids).logits
            with model.disable_adapter():
                seen.append((live, model(input_ids=ids).logits))
        for path, parameter in session.adapted.parameters.items():
            filled = [bool(row.any()) for row in parameter]
            assert all(filled) if "lora_A" in path else not any(filled)
        return original(session, *rest)

    monkeypatch.setattr(module, "fit", spy)
    run = plan(llama, tmp_path / "run", **options)
    frozen = train(run, text_file, max_steps=2)
    ((live, base),) = seen
    assert torch.equal(live, base)
    assert frozen.result.eval_loss < frozen.result.base_loss


@pytest.mark.parametrize(("method", "n"), [("lora", 2), ("prefix", 2), ("ffa", 2), ("qtha", 2)])
def test_a_training_in_bfloat16_records_its_probe_in_float32(
    llama: Path, text_file: Path, tmp_path: Path, method: str, n: int
) -> None:
    run = plan(llama, tmp_path / "run", inspect={"method": method, "rank": n}, circuits=None, layers=None)
    train(run, text_file, max_steps=2, bf16=True)
    probe = load_file(run.files.get(run.read(TrainedGenerator).probe))
    base = load_model(run.read(AdapterSpec).base, keep_dtype=False)
    with torch.no_grad():
        logits = base(input_ids=probe["input_ids"][None]).logits[0]
    torch.testing.assert_close(probe["base_logits"], logits[:, probe["columns"]], atol=1e-5, rtol=1e-5)


def test_where_the_data_lies_does_not_change_the_documents(
    trained: RunDirectory, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copy(text_file, tmp_path / "elsewhere.txt")
    run = plan(llama, tmp_path / "run")
    assert train(run, tmp_path / "elsewhere.txt") == trained.read(FrozenAdapter)


def test_one_step_trains(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    assert train(run, text_file, max_steps=1).result.n_steps == 1
    assert all(bool(tensor.any()) for path, tensor in tensors(run).items() if ".lora_B" in path)


def test_training_again_forgets_the_old_result_before_the_first_step(
    trained: RunDirectory, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(trained, tmp_path)
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train(run, text_file)
    assert not run.has(TrainedGenerator) and not run.has(FrozenAdapter)
    assert not list((run.path / "checkpoints").glob("step-*"))


def test_training_again_with_something_wrong_keeps_the_old_result(
    trained: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path)
    with pytest.raises(DataError):
        train(run, tmp_path / "missing.txt")
    with pytest.raises(OptionError):
        train(run, text_file, max_length=4096)
    assert run.read(FrozenAdapter) == trained.read(FrozenAdapter)
    assert (run.path / METRICS).read_bytes() == (trained.path / METRICS).read_bytes()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    from qpa.training.generator_callback import GeneratorCallback

    original = GeneratorCallback.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == n_steps + 1:
            raise KeyboardInterrupt
        original(self, args, state, control, **rest)

    monkeypatch.setattr(GeneratorCallback, "on_step_begin", stop)


def test_a_checkpoint_holds_no_pickle_and_is_a_peft_adapter(trained: RunDirectory) -> None:
    newest = sorted((trained.path / "checkpoints").iterdir())[-1]
    names = {file.name for file in newest.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.safetensors", "checkpoint.json"} <= names
    assert not {file for file in names if Path(file).suffix not in {".safetensors", ".json", ".md"}}


def copied(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(run.path, tmp_path / "copy")
    return RunDirectory(tmp_path / "copy")


@pytest.mark.parametrize("file", ["optimizer.safetensors", "checkpoint.json", "trainer_state.json"])
def test_a_checkpoint_cut_short_is_refused(
    trained: RunDirectory, text_file: Path, tmp_path: Path, file: str
) -> None:
    run = copied(trained, tmp_path)
    damaged = sorted((run.path / "checkpoints").iterdir())[-1] / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=file):
        train(run, text_file, resume=True)


def test_resume_refuses_what_would_not_be_the_same_training(
    trained: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected `lr` None, as before, found 0\.5"):
        train(run, text_file, resume=True, lr=0.5)
    with pytest.raises(CheckpointError, match="expected `seed` 0, as before, found 7"):
        train(run, text_file, resume=True, seed=7)
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(CheckpointError, match="train without `resume`"):
        train(run, text_file, resume=True)


def test_a_checkpoint_names_a_plan_as_it_was_called_before_its_schema_grew(
    trained: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path)
    before = run.read(AdapterSpec).digest
    path = run.path / AdapterSpec.file_name()
    content = json.loads(path.read_bytes()) | {"schema": "qpa.adapter-spec/6"}
    called = digest_of({key: value for key, value in content.items() if key != "digest"})
    path.write_text(json.dumps(content | {"digest": called}))
    assert run.read(AdapterSpec).digest == before != called
    newest = sorted((run.path / "checkpoints").iterdir())[-1] / "checkpoint.json"
    checkpoint = json.loads(newest.read_text().replace(before, called))
    del checkpoint["digest"]
    newest.write_text(json.dumps(checkpoint | {"digest": digest_of(checkpoint)}))
    train(run, text_file, resume=True)


def test_resume_refuses_changed_data(trained: RunDirectory, text_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    shutil.copy(text_file, data)
    run = plan(Path(trained.read(AdapterSpec).base.name_or_path), tmp_path / "run")
    train(run, data)
    data.write_text(data.read_text().replace("line", "lane"))
    with pytest.raises(CheckpointError, match="other data in the same files"):
        train(run, data, resume=True)


def test_a_gradient_that_is_not_finite_stops_and_names_step_and_checkpoint(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qpa.training.objectives.sft import SFTTrainer

    original = SFTTrainer.compute_loss

    def poisoned(self: Any, model: Any, *rest: Any, **options: Any) -> Any:
        loss = original(self, model, *rest, **options)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)
    run = plan(llama, tmp_path / "run")
    with pytest.raises(DivergedError, match=r"^step 5: .*last good checkpoint is .*step-00000003$"):
        train(run, text_file)
    assert not run.has(TrainedGenerator)
    assert (run.path / "checkpoints" / "step-00000003" / "checkpoint.json").is_file()


def test_prompts_are_masked(llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {n}?", "completion": f" it is {n}."} for n in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    frozen = train(plan(llama, tmp_path / "run"), data, max_length=64)
    held_out = 1
    completions = sum(len(row["completion"]) + 1 for row in rows)  # one token a byte, and the end of text
    n_tokens = frozen.result.n_train_tokens + frozen.result.n_eval_tokens
    assert held_out <= frozen.result.n_eval_tokens < frozen.result.n_train_tokens
    assert n_tokens == completions


def test_rows_without_a_completion_inside_max_length_are_refused(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "x" * 50, "completion": "y"}) for _ in range(4)))
    with pytest.raises(DataError, match="raise `max_length`"):
        train(plan(llama, tmp_path / "run"), data, max_length=32)


@pytest.mark.parametrize("generator", ["spectral", "state", "aligned", "paper"])
def test_an_adapter_on_the_head_learns(llama: Path, text_file: Path, tmp_path: Path, generator: str) -> None:
    """TRL's fused head knows only the base weight; an adapter on the head must train all the same."""
    layout = {"circuits": None, "layers": None, "generator": generator}
    layout |= {"chunk_size": 64} if generator == "paper" else {}
    run = plan(llama, tmp_path / "run", inspect={"targets": ("lm_head",)}, **layout)
    result = train(run, text_file, max_steps=8, lr=1e-2).result
    assert result.eval_loss < result.base_loss
    assert all(bool(tensor.any()) for tensor in tensors(run).values())


SMALL = {"circuits": None, "layers": None}
STATE = {"generator": "state"}


@pytest.mark.parametrize(
    ("inspect", "layout", "features", "n_trained"),
    [
        ({}, {}, "constant", 1),
        ({}, {}, "log-linear", 6),
        ({}, STATE, "circuit", 6),
        ({}, STATE, "circuit", 11),
        ({}, {}, "signed", 13),
        ({"method": "dora"}, STATE, "circuit", 6),
        ({"method": "dora"}, {}, "signed", 13),
        ({"method": "dora"}, {}, "signed", 164),  # with vectors
        ({"targets": ("all-linear", "embed_tokens")}, {}, "signed", 13),
    ],
    ids=str,
)
def test_a_handful_of_numbers_lowers_the_loss_and_resumes_to_the_same_bits(
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inspect: dict[str, Any],
    layout: dict[str, Any],
    features: str,
    n_trained: int,
) -> None:
    options = SMALL | layout | {"max_params": str(n_trained)}
    runs = [plan(llama, tmp_path / name, inspect=inspect, **options) for name in ("whole", "halved")]
    planned = runs[0].read(WeightLayout)
    assert (planned.generator, planned.features.kind) == ("state", features)
    assert planned.account.n_generator == n_trained
    result = train(runs[0], text_file).result
    assert result.eval_loss < result.base_loss
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(runs[1], text_file)
    monkeypatch.undo()
    train(runs[1], text_file, resume=True)
    assert runs[0].read(FrozenAdapter) == runs[1].read(FrozenAdapter)
    assert runs[0].read(FrozenAdapter).account.n_adapter == runs[0].read(AdapterSpec).n_numbers


def test_the_angles_of_a_state_learn_twice_as_fast_as_its_scale(llama: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run", max_params="6", **SMALL)
    options, layout, spec = TrainGenerator(data="text.txt"), run.read(WeightLayout), run.read(AdapterSpec)
    assert learning_rates(options, spec, layout) == (5e-2, 1e-1)
    assert learning_rates(replace(options, lr=3e-2), spec, layout) == (3e-2, 6e-2)
    assert learning_rates(replace(options, angle_lr=3e-2), spec, layout) == (5e-2, 3e-2)


@pytest.mark.parametrize("option", ["bf16", "grad_accum"])
def test_bf16_and_accumulation_keep_a_float32_adapter(
    llama: Path, text_file: Path, tmp_path: Path, option: str
) -> None:
    run = plan(llama, tmp_path / "run")
    result = train(run, text_file, **{option: 2 if option == "grad_accum" else True}).result
    assert result.eval_loss < result.base_loss
    assert {tensor.dtype for tensor in tensors(run).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"grad_accum": -1}, "grad_accum"),
        ({"max_steps": 0}, "max_steps"),
        ({"save_steps": 0}, "save_steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": 1e38}, "lr"),
        ({"angle_lr": -1.0}, "angle_lr"),
        ({"epochs": 0.0}, "epochs"),
        ({"warmup": -0.1}, "warmup"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": 4096}, "max_length"),
        ({"device": "abacus"}, "device"),
        ({"objective": "stf"}, "objective"),
    ],
)
def test_options_out_of_range_are_named(
    trained: RunDirectory, text_file: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=f"^{words}: expected"):
        train(trained, text_file, **options)


def test_a_config_without_weights_is_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    run = plan(model, tmp_path / "run")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="expected a model with its weights"):
        train(run, text_file)


def test_a_model_that_changed_since_the_plan_is_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    run = plan(model, tmp_path / "run")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match="the config the adapter was planned for"):
        train(run, text_file)


def test_freeze_refuses_an_adapter_that_is_not_the_generators(trained: RunDirectory, tmp_path: Path) -> None:
    from safetensors.torch import save

    from qpa.passes.freeze_adapter import FreezeAdapter

    run = copied(trained, tmp_path)
    *documents, measurement = run.read_through(Measurement)
    trained_generator = documents[-1]
    assert isinstance(trained_generator, TrainedGenerator)
    adapter = load_file(run.files.get(trained_generator.adapter))
    path = next(iter(adapter))
    adapter[path] = adapter[path] + 1e-3
    forged = trained_generator.model_copy(
        update={"adapter": run.files.put("forged.safetensors", save(adapter))}
    )
    with pytest.raises(DocumentError, match="what the generator gives"):
        FreezeAdapter().run(measurement, PassContext(0, run.files, (*documents, forged)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_agrees_with_the_cpu(llama: Path, text_file: Path, tmp_path: Path) -> None:
    cpu, cuda = (plan(llama, tmp_path / device, spectrum=False) for device in ("cpu", "cuda"))
    train(cpu, text_file)
    train(cuda, text_file, device="cuda")
    for path, tensor in tensors(cpu).items():
        torch.testing.assert_close(tensors(cuda)[path], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_spectrum_on_cuda_learns_as_much_as_on_the_cpu(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Directions of nearly equal singular values may turn between devices; what they buy may not."""
    cpu, cuda = plan(llama, tmp_path / "cpu"), plan(llama, tmp_path / "cuda")
    expected = train(cpu, text_file).result
    found = train(cuda, text_file, device="cuda").result
    assert found.base_loss == pytest.approx(expected.base_loss, rel=1e-4)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=1e-2)


@pytest.mark.assets
def test_a_real_model_learns_a_real_text(assets: Path, tmp_path: Path) -> None:
    run = plan(
        assets / "models" / "stories260K", tmp_path / "run", inspect={"rank": 8}, circuits=None, layers=None
    )
    text = tmp_path / "bard.txt"
    text.write_text((assets / "data" / "tinyshakespeare" / "input.txt").read_text()[:40_000])
    result = train(run, text, max_steps=20, max_length=128, batch_size=8).result
    assert result.eval_loss < result.base_loss - 0.5
