"""Contexts: a network programs the features, every step is of one context, and each is frozen by its name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qpa.documents import FrozenAdapter, Measurement, NativeCircuit, TrainedGenerator
from qpa.errors import OptionError
from qpa.generators.fast_weights import contexts_of
from qpa.generators.features.kind import FEATURES
from qpa.generators.generator import GENERATORS, make_generator
from qpa.passes import freezing_pipeline, training_pipeline
from qpa.passes.freeze_adapter import FreezeAdapter, check_frozen
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import METRICS, RunDirectory
from qpa.training.attach_run import attach_run
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.row_order import ContextOrder
from tests import process_worker
from tests.small_specs import NOWHERE, small_spec
from tests.test_processes import finish, start
from tests.test_state import bases_of
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

SPEC = small_spec(3, 4)
NAMES = ("sums", "words", "more")
PROGRAMMED = [
    *(("state", name) for name in FEATURES if name not in ("random", "constant")),
    *(("spectral", name) for name in ("circuit", "classical", "bits")),
    *(("aligned", name) for name in ("circuit", "classical", "bits")),
]


def generator_of(generator: str = "state", features: str = "signed", **options: Any) -> Any:
    step = PlanLayout(generator=generator, features=features, layers=2, contexts=NAMES, **options)
    layout = step.run(SPEC, NOWHERE)
    made = make_generator(layout, 0, bases_of(layout))
    with torch.no_grad():
        for decoder in made.decoders.parameters():
            decoder.fill_(0.5)  # so that the features show
    return made


def outputs_of(generator: Any, context: int | torch.Tensor) -> torch.Tensor:
    contexts_of(generator).choose(context)
    return torch.cat([one.flatten() for one in generator()])


# The generator


@pytest.mark.parametrize(("generator", "features"), PROGRAMMED)
def test_contexts_start_alike_as_the_features_alone_and_are_moved_apart_by_the_network(
    generator: str, features: str
) -> None:
    made = generator_of(generator, features)
    plain = PlanLayout(generator=generator, features=features, layers=2).run(SPEC, NOWHERE)
    start = [outputs_of(made, index) for index in range(len(NAMES))]
    assert all(torch.equal(start[0], other) for other in start[1:])
    alone: Any = make_generator(plain, 0, bases_of(plain))
    assert torch.equal(alone.features(alone.run()), made.features(made.run()))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".0.weights"):
                parameter.add_(0.5)
    moved = [outputs_of(made, index) for index in range(len(NAMES))]
    assert not any(torch.equal(moved[0], other) for other in moved[1:])


@pytest.mark.parametrize(("generator", "features"), PROGRAMMED)
def test_the_account_counts_the_network_and_the_contexts(generator: str, features: str) -> None:
    made = generator_of(generator, features, context_size=3)
    account = made.layout.account
    n_programmed = account.n_angles + account.n_control
    assert account.n_program == 3 * n_programmed + 3 * len(NAMES)
    assert account.n_generator == sum(p.numel() for p in made.parameters() if p.requires_grad)
    groups = made.parameter_groups()
    assert account.n_generator == sum(p.numel() for group in groups for p in group.parameters)


def test_a_prompts_context_is_known_and_not_trained() -> None:
    made = generator_of(context_kind="prompt")
    contexts_of(made).set_raw(torch.tensor([[1.0, 2, 3, 4], [5, 2, 3, 4], [9, 2, 3, 4]]))
    assert made.layout.account.n_program == 4 * made.layout.account.n_angles
    vectors = contexts_of(made).vectors
    assert torch.allclose(vectors.mean(0), torch.zeros(4)) and vectors.square().mean() == pytest.approx(1.0)
    assert torch.equal(contexts_of(made).normalised(torch.tensor([5.0, 2, 3, 4])), vectors[1])
    again = generator_of(context_kind="prompt")
    again.load_state_dict(made.state_dict())
    assert torch.equal(contexts_of(again).vectors, vectors)


def test_the_gradient_of_the_network_is_the_one_of_differences() -> None:
    made = generator_of().double()
    with torch.no_grad():
        network = made.chunk_features.parametrizations.angles[0].weights
        network.copy_(torch.linspace(-0.3, 0.3, network.numel()).view_as(network))
    places = torch.linspace(-1, 1, len(outputs_of(made, 0)), dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (outputs_of(made, 1) * places).sum()

    loss().backward()
    for parameter, place in ((network, (3, 1)), (contexts_of(made).vectors, (1, 2))):
        found, values = parameter.grad[place].item(), []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[place] += shift
                values.append(loss().item())
                parameter[place] -= shift
        assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert not contexts_of(made).vectors.grad[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ("one",)}, "contexts: expected at least two names, each once, found one"),
        ({"contexts": ("a", "a")}, "contexts: expected at least two names, each once, found a,a"),
        ({"features": "constant"}, "features: expected a kind that trains what `contexts` could program"),
        ({"max_params": "200"}, "max_params: expected no budget with `contexts`, found 200; choose `layers`"),
    ],
)
def test_what_contexts_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        PlanLayout(**{"generator": "state", "contexts": NAMES, **options}).run(SPEC, NOWHERE)
    assert str(caught.value).startswith(message)


def test_a_generator_that_programs_nothing_refuses_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = GENERATORS["state"]
    plain = state.plan
    monkeypatch.setattr(
        type(state), "plan", lambda *_: plain(PlanLayout(generator="state"), SPEC, SPEC.provenance)
    )
    with pytest.raises(OptionError, match="contexts: expected none with `generator` state, found sums,words"):
        PlanLayout(generator="state", contexts=NAMES).run(SPEC, NOWHERE)


# The optimizer and the order of the rows


def test_a_step_moves_the_context_of_its_gradient_and_leaves_the_adapter_of_the_next() -> None:
    made = generator_of(context_size=2)
    order = [1, 0, 1, 2, 0]
    adapter = [torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in made.layout.tensors]
    optimizer = GeneratedAdapterOptimizer(
        adapter, made, lr=0.1, angle_lr=0.1, context_of_step=order.__getitem__
    )
    for step in range(4):
        held = torch.cat([one.detach().flatten() for one in adapter])
        assert torch.equal(held, outputs_of(made, order[step]).detach())
        before = contexts_of(made).vectors.detach().clone()
        for parameter in adapter:
            parameter.grad = torch.ones_like(parameter) * parameter.detach().sign()
        contexts_of(made).choose(order[step])
        optimizer.step()
        moved = (contexts_of(made).vectors.detach() != before).any(1)
        # The network starts at zero, so that the vectors have no gradient in the first step.
        assert bool(moved[order[step]]) == (step > 0)


@pytest.mark.parametrize("sizes", [(20, 7, 1), (4, 4), (3, 50)])
def test_every_block_is_of_one_context_and_an_epoch_takes_every_row_once(sizes: tuple[int, ...]) -> None:
    order = ContextOrder(sizes, 4, seed=5)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    found = []
    for epoch in range(3):
        order.set_epoch(epoch)
        rows = list(order)
        assert len(rows) == len(order) == 4 * order.n_steps
        assert sorted(row for row in rows if row < ends[-1]) == list(range(ends[-1]))
        assert set(rows) <= {*range(ends[-1] + 1)}
        for step in range(order.n_steps):
            block = [row for row in rows[4 * step : 4 * step + 4] if row < ends[-1]]
            contexts = {next(i for i, end in enumerate(ends) if row < end) for row in block}
            assert contexts == {order.context_of_step(epoch * order.n_steps + step)}
        found.append(rows)
    assert found[0] != found[1]
    again = ContextOrder(sizes, 4, seed=5)
    again.set_epoch(1)
    assert list(again) == found[1]
    assert ContextOrder(sizes, 4, seed=6)._turns(0) != order._turns(0) or len(set(sizes)) == 1


def test_contexts_take_turns_by_their_rows() -> None:
    order = ContextOrder((400, 100), 4, seed=0)
    for first in range(0, 125, 25):
        turns = Counter(order.context_of_step(step) for step in range(first, first + 25))
        assert abs(turns[1] - 5) <= 1


# Training


@pytest.fixture(scope="module")
def files(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a text, rows with prompts and another text, of other lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    words = folder / "words.jsonl"
    rows = [{"prompt": f"{n} is ", "completion": "odd" if n % 2 else "even"} for n in range(40)]
    words.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = folder / "more.txt"
    more.write_text("".join(f"{chr(97 + n % 26)} comes before {chr(98 + n % 25)}, " for n in range(60)))
    return [str(text_file), str(words), str(more)]


def train_on(run: RunDirectory, files: list[str], **options: Any) -> FrozenAdapter:
    documents = run.read_through(NativeCircuit)
    defaults = {"max_steps": 12, "max_length": 32, "batch_size": 4, "lr": 0.1, "device": "cpu"}
    step = TrainGenerator(data=tuple(files), **{**defaults, **options})
    context = PassContext(0, run.files, documents)
    return training_pipeline(step).run(documents[-1], context, run.write).document(FrozenAdapter)


PLAN: dict[str, Any] = {"generator": "state", "features": "signed", "circuits": 1, "contexts": NAMES}


@pytest.fixture(scope="module")
def trained(llama: Path, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = plan(llama, tmp_path_factory.mktemp("trained") / "run", **PLAN)
    train_on(run, files, eval_steps=5)
    return run


def freeze(run: RunDirectory, data: tuple[str, ...] | None = None, **options: Any) -> FrozenAdapter:
    documents = run.read_through(TrainedGenerator)
    pipeline = freezing_pipeline(MeasureCircuit(**options), FreezeAdapter(data=data))
    return pipeline.run(documents[-1], PassContext(0, run.files, documents), run.write).document(
        FrozenAdapter
    )


def check(run: RunDirectory) -> None:
    check_frozen(PassContext(0, run.files, run.read_through(FrozenAdapter)))


def test_each_context_is_frozen_as_the_live_model_had_it(trained: RunDirectory) -> None:
    document, found = trained.read(TrainedGenerator), []
    assert document.adapter == document.contexts[0].adapter
    for context, name in zip(document.contexts, NAMES, strict=True):
        frozen = freeze(trained, context=name)
        assert (frozen.context, frozen.arrays, frozen.probe) == (name, context.adapter, context.probe)
        assert frozen.result.eval_loss == frozen.frozen_loss == context.eval_loss < context.base_loss
        assert frozen.result.base_loss == context.base_loss and frozen.weight_error == 0
        assert trained.read(Measurement).context_name == name
        check(trained)
        found.append(tensors(trained))
    assert not any(same_bits(found[0], other) for other in found[1:])
    assert freeze(trained).context == NAMES[0]


def test_losses_are_those_of_each_task_with_its_own_adapter(
    trained: RunDirectory, files: list[str], llama: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (trained.path / METRICS).read_text().splitlines()]
    contexts = trained.read(TrainedGenerator).contexts
    scored = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in scored] == [0, 5, 10, 12]
    n = sum(one.n_eval_tokens for one in contexts)
    for line in scored:
        total = sum(line[f"eval_loss_{one.name}"] * one.n_eval_tokens for one in contexts) / n
        assert line["eval_loss"] == pytest.approx(total)
    # A training on one source alone has the same rows, and so the same loss before its first step.
    alone = plan(llama, tmp_path / "run", **{**PLAN, "contexts": None})
    result = train_on(alone, files[1:2], max_steps=1).result
    assert result.base_loss == contexts[1].base_loss == scored[0]["eval_loss_words"]
    assert (result.n_train_tokens, result.n_eval_tokens) == (
        contexts[1].n_train_tokens,
        contexts[1].n_eval_tokens,
    )
    # With its data, what counts give is scored on the context's own rows.
    counted = freeze(trained, tuple(files), context="words", source="shots", shots=200_000)
    assert counted.frozen_loss == pytest.approx(contexts[1].eval_loss, abs=0.05)
    assert 0 < (counted.weight_error or 0) < 0.3 and counted.result.eval_loss == contexts[1].eval_loss
    check(trained)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_the_rows_of_every_step_are_of_the_context_whose_adapter_they_go_through(
    llama: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grad_accum: int
) -> None:
    from qpa.training import session as module

    seen: list[tuple[int, int]] = []
    prepare = module.prepare

    def watching(*arguments: Any) -> Any:
        session = prepare(*arguments)
        trainer, optimizer = session.trainer, session.adapted.optimizer
        ids = [{tuple(row["input_ids"]) for row in task.splits.training} for task in session.tasks]
        train_step = trainer.training_step

        def step(model: Any, inputs: Any, *rest: Any) -> Any:
            for row, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
                if max(labels) >= 0:
                    (owner,) = (i for i, own in enumerate(ids) if any(tuple(row[: len(o)]) == o for o in own))
                    assert owner == contexts_of(optimizer.generator).chosen
                    seen.append((optimizer.n_steps, owner))
            return train_step(model, inputs, *rest)

        monkeypatch.setattr(trainer, "training_step", step)
        return session

    monkeypatch.setattr(module, "prepare", watching)
    run = plan(llama, tmp_path / "run", **PLAN)
    train_on(run, files, grad_accum=grad_accum, max_steps=None, epochs=2)
    by_step: dict[int, set[int]] = {}
    for step, owner in seen:
        by_step.setdefault(step, set()).add(owner)
    assert all(len(owners) == 1 for owners in by_step.values())
    assert {owner for owners in by_step.values() for owner in owners} == {0, 1, 2}
    assert len(by_step) == run.read(TrainedGenerator).result.n_steps


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("task", {"max_steps": None, "epochs": 2, "batch_size": 12, "save_steps": 2, "eval_steps": 7}),
        ("prompt", {"max_steps": 8, "save_steps": 3}),
        ("task", {"max_steps": 5, "save_steps": 1, "eval_steps": 2, "source": "shots", "shots": 256}),
    ],
)
def test_a_resumed_training_has_the_same_bits(
    llama: Path,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, Any],
) -> None:
    whole = plan(llama, tmp_path / "whole", **PLAN, context_kind=kind)
    train_on(whole, files, **options)
    run = plan(llama, tmp_path / "run", **PLAN, context_kind=kind)
    n_steps = whole.read(TrainedGenerator).result.n_steps
    with monkeypatch.context() as patch:
        interrupt_after(patch, n_steps - 3)
        with pytest.raises(KeyboardInterrupt):
            train_on(run, files, **options)
    train_on(run, files, resume=True, **options)
    assert (run.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()
    assert run.read(TrainedGenerator).to_json() == whole.read(TrainedGenerator).to_json()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_what_one_does(llama: Path, files: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 5, "eval_steps": 4, "max_length": 32, "batch_size": 3, "lr": 0.1}
    one, jobs = {}, []
    for features in ("signed", "log-linear"):
        one[features] = plan(llama, tmp_path / f"one {features}", **PLAN | {"features": features})
        train_on(one[features], files, **options, grad_accum=2)
        two = plan(llama, tmp_path / f"two {features}", **PLAN | {"features": features})
        jobs.append({"run": str(two.path), "options": {"data": files, "device": "cpu", **options}})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = start([process_worker.__file__, tmp_path / "jobs.json"], [tmp_path, tmp_path])
    assert [code for code, _ in finish(worker)] == [0, 0]
    for features, alone in one.items():
        found = RunDirectory(tmp_path / f"two {features}")
        expected = alone.read(TrainedGenerator)
        for context, other in zip(found.read(TrainedGenerator).contexts, expected.contexts, strict=True):
            assert context.eval_loss == pytest.approx(other.eval_loss, abs=1e-4)
            mine = load_file(found.files.get(context.adapter))
            for path, tensor in load_file(alone.files.get(other.adapter)).items():
                torch.testing.assert_close(mine[path], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("generator", ["spectral", "aligned"])
def test_other_generators_train_with_contexts(
    llama: Path, files: list[str], tmp_path: Path, generator: str
) -> None:
    run = plan(llama, tmp_path / "run", generator=generator, contexts=NAMES)
    train_on(run, files, max_steps=8, lr=0.02)
    assert all(one.eval_loss < one.base_loss for one in run.read(TrainedGenerator).contexts)
    freeze(run, context="more")
    check(run)


def test_a_prompt_that_was_not_trained_on_is_frozen(llama: Path, files: list[str], tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run", **PLAN, context_kind="prompt")
    train_on(run, files)
    named = freeze(run, context="words")
    frozen = freeze(run, context_prompt="line 3: 3 and 0 make 3.\nline 4: 4 and 1 make 4.\n" * 20)
    assert frozen.context is not None and frozen.context.startswith('the prompt "line 3')
    assert frozen.frozen_loss is None and frozen.weight_error == 0
    assert frozen.arrays != named.arrays
    check(run)
    near, far = contexts_near(run)
    assert near < far


def contexts_near(run: RunDirectory) -> tuple[float, float]:
    """Return the distance of the frozen context to that of the sums, and to that of the words."""
    measured, trained = run.read(Measurement), run.read(TrainedGenerator)
    assert measured.context is not None
    vector = load_file(run.files.get(measured.context.vector))["context"]
    vectors = load_file(run.files.get(trained.arrays))["contexts.vectors"]
    return float((vector - vectors[0]).norm()), float((vector - vectors[1]).norm())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 2}, "data: expected 3 sources, one for each of sums, words, more, found 2"),
        ({"objective": "dpo"}, "objective: expected sft with `contexts`, found dpo"),
        ({"source": "backend", "backend": "aer", "yes": True}, "source: expected one that is simulated"),
    ],
)
def test_a_training_that_knows_no_contexts_is_refused(
    trained: RunDirectory, files: list[str], options: dict[str, Any], message: str
) -> None:
    n_files = options.pop("data", 3)
    with pytest.raises(OptionError) as caught:
        train_on(trained, files[:n_files], **options)
    assert str(caught.value).startswith(message)
    assert trained.has(TrainedGenerator)


def test_a_loop_of_ones_own_chooses_the_context(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run", **PLAN)
    rows = torch.randint(1, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": rows, "labels": rows}
    attached = attach_run(run.path, [batch], lr=0.1, device="cpu")
    for step in range(4):
        attached.optimizer.use_context(step % 2)
        attached.model(**batch).loss.backward()
        attached.optimizer.step()
        attached.optimizer.zero_grad()
    found = []
    for index in range(3):
        attached.optimizer.use_context(index)
        found.append(torch.cat([one.detach().flatten() for one in attached.parameters.values()]))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    prompts = plan(llama, tmp_path / "prompts", **PLAN, context_kind="prompt")
    with pytest.raises(OptionError, match="context_kind: expected task under a trainer of your own"):
        attach_run(prompts.path, [batch], device="cpu")


# The command line


def test_the_command_line_freezes_a_context_and_names_those_it_knows(
    trained: RunDirectory, cli: Any, llama: Path, tmp_path: Path
) -> None:
    run = trained.path
    code, out, err = cli("freeze", run, "--context", "more")
    assert code == 0, err
    assert any(line.split() == ["frozen", "for", "the", "context", "more"] for line in out.splitlines())
    assert f"qpa freeze {run} --context sums or words" in out
    line = cli.refuses("freeze", run, "--context", "mor")
    assert line == "error: --context: expected sums, words or more, found mor; did you mean more?\n"
    line = cli.refuses("freeze", run, "--context-prompt", "Hello")
    assert line.startswith("error: --context-prompt: expected --context, one of sums, words or more")
    code, _, err = cli("export", run, "--format", "lora", "--out", tmp_path / "export")
    assert code == 0, err
    assert "This is the one for\nmore." in (tmp_path / "export" / "README.md").read_text()
    code, _, err = cli("report", run)
    page = (run / "report.html").read_text()
    assert code == 0 and "change of loss" in page and "frozen from" not in page, err
    assert all(f"{one.eval_loss:.4f}" in page for one in trained.read(TrainedGenerator).contexts)
    line = cli.refuses("noise", run, "--out", tmp_path / "noise", "--targets", "none")
    assert line.startswith("error: --contexts: expected one adapter for all data, in a study of noise")
    code, out, err = cli("inspect", run)
    assert code == 0 and "sums, words, more" in out, err


def test_a_run_without_contexts_refuses_one(llama: Path, text_file: Path, cli: Any, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    expected = "error: --context: expected none, since the plan has no --contexts, found words; leave it out"
    line = cli.refuses("train", run.path, "--data", text_file, "--context", "words", "--max-steps", "1")
    assert line.startswith(expected)
    train(run, text_file, max_steps=1)
    assert cli.refuses("freeze", run.path, "--context", "words").startswith(expected)
