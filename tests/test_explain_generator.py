"""What the parts of a trained generator contribute: known cases, intervals, refusals, and the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpa.documents import (
    AdapterSpec,
    Explanation,
    FrozenAdapter,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import DataError, DocumentError
from qpa.explanation.adapter_parts import bands, layer_parts
from qpa.explanation.contributions import contributions
from qpa.explanation.generator_parts import circuit_parts, flipped, qubit_words
from qpa.explanation.part import Change, Subject
from qpa.explanation.parts import left_out, parts_of
from qpa.explanation.shares import shares_of
from qpa.generators.chunks import basis_names
from qpa.generators.generator import make_generator
from qpa.passes import explaining_pipeline
from qpa.passes.explain_generator import ExplainGenerator, decode
from qpa.passes.freeze_adapter import Scorer
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.report.explanation import explanation_json, parts_rows, shares_rows
from qpa.store.run_directory import RunDirectory
from qpa.training.evaluation import RowLosses
from tests.command_line import Cli
from tests.small_specs import NOWHERE, small_spec
from tests.test_fast_weights import freeze, train_on
from tests.test_state import bases_of
from tests.test_train_generator import plan, tensors, train

SPEC = small_spec(3, 4)


@pytest.fixture(scope="module")
def state(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Return a trained run of one state, with a qubit for the sign."""
    place = tmp_path_factory.mktemp("state")
    layout = {"generator": "state", "features": "signed", "circuits": 1, "layers": 2}
    run = plan(llama, place / "run", inspect={"rank": 4}, **layout)
    train(run, text_file, max_steps=4)
    return run


def explain(run: RunDirectory, *data: str | Path, **options: object) -> Explanation:
    documents = run.read_through(FrozenAdapter)
    context = PassContext(0, run.files, documents)
    step = ExplainGenerator(**{"data": tuple(map(str, data)), "permutations": 1, "rows": 3, **options})
    return explaining_pipeline(step).run(documents[-1], context).document(Explanation)


def subject_of(run: RunDirectory, n_permutations: int = 2) -> Subject:
    documents = run.read_through(FrozenAdapter)
    step = ExplainGenerator(data=(), permutations=n_permutations)
    return step.subject(PassContext(0, run.files, documents))


def synthetic(layout: PlanLayout, n_permutations: int = 3, **changes: object) -> Subject:
    """Return a generator of a small model with random bases and decoders, its circuits as they start."""
    planned = layout.run(SPEC, NOWHERE)
    generator = make_generator(planned, planned.seed, bases_of(planned))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generator.decoders.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
        measured = generator.run()
    arrays = {name: array.detach().clone() for name, array in generator.state_dict().items()}
    measured = None if measured is None else measured.detach()
    return Subject.of(SPEC, planned, arrays, measured, n_permutations=n_permutations, seed=1)


def part_of(found: Explanation, name: str):
    return next(part for part in found.parts if part.name == name)


# Known cases


def test_what_stands_for_all_of_the_adapter_is_worth_the_whole_gain(
    state: RunDirectory, text_file: Path
) -> None:
    found = explain(state, text_file, rows=None, permutations=2)
    result = state.read(TrainedGenerator).result
    assert found.gain.value == found.base_loss - found.trained_loss != 0
    assert found.base_loss == pytest.approx(result.base_loss, abs=1e-5)
    assert found.trained_loss == pytest.approx(result.eval_loss, abs=1e-5)
    assert found.n_tokens == result.n_eval_tokens
    # A scale of zero, no direction, and no sign: each leaves nothing of the adapter.
    for name in ("decoder directions", "all directions", "q0 (sign)"):
        assert part_of(found, name).ablation == found.gain
    for part in found.parts:
        for one in (part.ablation, part.permutation):
            assert one is None or one.low <= one.value <= one.high
    assert any(part.ablation.low < part.ablation.high for part in found.parts if part.ablation)


def test_circuits_that_were_not_trained_contribute_exactly_nothing_beyond_their_start(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = plan(llama, tmp_path / "run", features="random", circuits=2)
    train(run, text_file)
    found = explain(run, text_file)
    start = part_of(found, "circuit at its start").ablation
    assert (start.value, start.low, start.high) == (0.0, 0.0, 0.0)
    assert found.gain.value > 0 and found.places == () and found.unused is None
    assert {part.kind for part in found.parts} == {
        *("circuit", "decoder", "directions", "qubit", "layer", "module type")
    }


@pytest.mark.parametrize("features", ["log-linear", "classical"])
def test_a_control_has_no_qubits_and_its_own_row(
    llama: Path, text_file: Path, tmp_path: Path, features: str
) -> None:
    generator = {"generator": "state", "circuits": None, "layers": None} if features == "log-linear" else {}
    run = plan(llama, tmp_path / "run", features=features, **generator)
    train(run, text_file)
    found = explain(run, text_file)
    kinds = {part.kind for part in found.parts}
    assert "control" in kinds and not kinds & {"circuit", "qubit"}
    assert part_of(found, "control at its start").ablation.value != 0
    assert all(place.probability is None for place in found.places)
    if found.places:
        assert sum(place.squared for place in found.places) == pytest.approx(1)
    assert found.unused is None


@pytest.mark.parametrize("generator", ["paper", "aligned"])
def test_generators_without_directions_have_the_rows_that_make_sense(generator: str) -> None:
    subject = synthetic(PlanLayout(generator=generator, circuits=1, layers=2, chunk_size=None))
    kinds = [part.kind for part in parts_of(subject)]
    assert "directions" not in kinds and {"circuit", "decoder", "qubit", "layer"} <= set(kinds)
    as_it_is, at_its_start = (
        decode(subject, Change()),
        decode(subject, next(circuit_parts(subject)).ablated()),
    )
    assert all(torch.equal(as_it_is[path], at_its_start[path]) for path in as_it_is)


@pytest.mark.parametrize("method", ["ffa", "prefix"])
def test_every_kind_of_adapter_is_explained(
    llama: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    run = plan(llama, tmp_path / "run", inspect={"method": method})
    train(run, text_file, max_steps=2)
    found = explain(run, text_file)
    assert found.gain.value == pytest.approx(found.base_loss - found.trained_loss)
    assert {"circuit", "decoder", "qubit", "layer"} <= {part.kind for part in found.parts}
    assert part_of(found, "layer 1").ablation.value != 0


def test_the_circuit_of_an_adapter_that_reads_inputs_is_a_role_of_its_tensors(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    inspect = {"method": "qtha", "rank": 2, "targets": ("q_proj",)}
    run = plan(llama, tmp_path / "run", inspect=inspect, circuits=None, layers=None)
    train(run, text_file, max_steps=3)
    found = explain(run, text_file)
    assert part_of(found, "all qtha_angles").ablation.value != 0
    assert part_of(found, "all qtha_up_2").ablation == found.gain


def test_preferences_are_explained_by_pairs(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "preferences.jsonl"
    rows = ({"prompt": f"say {n}: ", "chosen": f"{n} yes", "rejected": f"{n} no."} for n in range(24))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = plan(llama, tmp_path / "run")
    train(run, data, objective="dpo", max_steps=4, max_length=64, lr=2e-2)
    found, result = explain(run, data, rows=None), run.read(FrozenAdapter).result
    before_and_after = (result.base_loss, result.eval_loss)
    assert (found.base_loss, found.trained_loss) == pytest.approx(before_and_after, abs=1e-5)
    assert found.n_rows == found.n_tokens


def test_an_adapter_of_a_context_is_explained_on_its_own_rows(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{chr(97 + n % 26)} comes before {chr(98 + n % 25)}, " for n in range(60)))
    files = (str(text_file), str(other))
    run = plan(llama, tmp_path / "run", generator="state", circuits=1, contexts=("lines", "letters"))
    train_on(run, list(files), max_steps=6)
    frozen = freeze(run, context="letters")
    found = explain(run, *files, rows=None)
    assert found.n_tokens == frozen.result.n_eval_tokens
    before_and_after = (frozen.result.base_loss, frozen.result.eval_loss)
    assert (found.base_loss, found.trained_loss) == pytest.approx(before_and_after, abs=1e-5)
    *documents, measured, last = run.read_through(FrozenAdapter)
    prompt = measured.context.model_copy(update={"name": None, "prompt": "x"})
    of_prompt = measured.model_copy(update={"context": prompt})
    context = PassContext(0, run.files, (*documents, of_prompt, last))
    with pytest.raises(DataError, match='expected an adapter for data of the training, found the prompt "x"'):
        ExplainGenerator(data=files).run(last, context)


# Changes


def test_a_layer_that_is_left_out_is_as_it_started_and_others_as_trained(state: RunDirectory) -> None:
    subject, adapter = subject_of(state), tensors(state)
    (part,) = [part for part in layer_parts(subject) if part.name == "layer 1"]
    found = decode(subject, part.ablated())
    for path, tensor in found.items():
        if ".layers.1." in path:
            assert not tensor.any() if "lora_B" in path else True
        else:
            torch.testing.assert_close(tensor, adapter[path], rtol=1e-5, atol=1e-6)


def test_layers_exchange_what_they_have_and_nothing_else() -> None:
    subject = synthetic(PlanLayout(generator="state", features="circuit", circuits=1, layers=2))
    part = next(layer_parts(subject))
    assert part.name == "the order of layers" and part.ablated is None and len(part.permuted) == 3
    for make in part.permuted:
        features = make().features
        assert not torch.equal(features, subject.features)
        torch.testing.assert_close(features.sum(), subject.features.sum())


def test_a_direction_without_coefficient_leaves_the_sum_of_the_others() -> None:
    subject = synthetic(PlanLayout(generator="state", features="circuit", circuits=1, layers=2))
    parts = {part.name: part for part in parts_of(subject)}
    whole, none = decode(subject, Change()), decode(subject, parts["all directions"].ablated())
    names = ["direction 1", "direction 2", "directions 3 to 4"]
    without = [decode(subject, parts[name].ablated()) for name in names]
    for a, b in SPEC.pairs:
        product = whole[b.path] @ whole[a.path]
        lost = sum(product - found[b.path] @ found[a.path] for found in without)
        torch.testing.assert_close(lost, product, rtol=1e-4, atol=1e-5)
        assert not none[b.path].any()
    # Another order of coefficients is another sum of the same rank-1 matrices, of the same singular vectors.
    moved = decode(subject, parts["all directions"].permuted[0]())
    a, b = SPEC.pairs[0]
    assert not torch.allclose(moved[b.path] @ moved[a.path], whole[b.path] @ whole[a.path])
    names_of = basis_names(subject.layout)
    assert torch.equal(moved[a.path].sort(0).values, subject.arrays[names_of[a.path]].sort(0).values)


def test_a_bit_that_is_averaged_is_a_coin_and_flipped_twice_it_is_as_it_was() -> None:
    probabilities = torch.rand(2, 8)
    for qubit in range(3):
        other = flipped(probabilities, qubit)
        assert torch.equal(flipped(other, qubit), probabilities)
        mean = ((probabilities + other) / 2).view(2, *(2,) * 3).unbind(1 + qubit)
        torch.testing.assert_close(mean[0], mean[1])
    assert torch.equal(flipped(probabilities, 0)[:, 0], probabilities[:, 4])


def test_qubits_are_named_by_what_their_register_counts() -> None:
    def words(**options: object) -> list[str]:
        return qubit_words(PlanLayout(**options).run(SPEC, NOWHERE))

    named = ["layer"] * 2 + ["module type"] * 3 + ["direction"] * 2
    assert words(generator="state") == named
    assert words(generator="state", features="signed") == ["sign", *named]
    assert set(words(circuits=2)) == {"window", "chunk", "group"}
    assert set(words(generator="aligned", circuits=2)) == {""}


def test_bands_double() -> None:
    assert list(bands(1)) == [(0, 1)]
    assert list(bands(11)) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 11)]


# Shares


@pytest.mark.parametrize("features", ["circuit", "signed"])
def test_the_probability_of_all_places_and_of_what_is_unused_is_one(features: str) -> None:
    subject = synthetic(
        PlanLayout(generator="state", features=features, circuits=1, layers=2, vectors=("down_proj",))
    )
    found = shares_of(subject)
    assert found.unused + sum(place.probability for place in found.places) == pytest.approx(1)
    # A uniform state has as much as basis states are left.
    n_used = len(subject.layout.states) * (2 if features == "signed" else 1)
    assert 1 - found.unused == pytest.approx(n_used / 2**subject.layout.ansatz.n_qubits, abs=0.1)
    squares = [place.squared for place in found.places if place.squared is not None]
    assert sum(squares) == pytest.approx(1) == sum(one.squared for one in found.directions)
    assert {place.module_type for place in found.places if place.squared is None} == {
        *("down_proj.lora_A", "down_proj.lora_B")
    }
    assert {place.layer for place in found.places} == {0, 1, 2}
    assert len(found.directions) == 4


# Intervals


def losses(values: list[float], weights: list[float]) -> RowLosses:
    weights_ = torch.tensor(weights, dtype=torch.float64)
    return RowLosses(torch.tensor(values, dtype=torch.float64) * weights_, weights_)


def test_a_contribution_is_weighted_by_tokens_and_paired_over_rows() -> None:
    trained = losses([1.0, 3.0, 2.0], [10, 1, 1])
    shifted = losses([1.5, 3.5, 2.5], [10, 1, 1])
    found = contributions(trained, [[shifted], [trained]], ["a", "b"], 0)
    # Rows differ much, and their differences not at all.
    assert [found[0].value, found[0].low, found[0].high] == pytest.approx([0.5, 0.5, 0.5])
    assert (found[1].value, found[1].low, found[1].high) == (0.0, 0.0, 0.0)
    one = losses([1.0, 3.0, 14.0], [10, 1, 1])
    assert contributions(trained, [[one]], ["a"], 0)[0].value == pytest.approx(1.0)


def test_an_interval_is_as_wide_as_rows_and_permutations_differ() -> None:
    random = torch.Generator().manual_seed(0)
    n = 400
    trained = losses([2.0] * n, [5.0] * n)
    noise = torch.randn(n, generator=random).tolist()
    noisy = losses([2.1 + x for x in noise], [5.0] * n)
    (found,) = contributions(trained, [[noisy]], ["a"], 0)
    assert found.high - found.low == pytest.approx(2 * 1.96 / n**0.5, rel=0.15)
    orders = [losses([2.0 + shift] * n, [5.0] * n) for shift in (0.1, 0.2, 0.3)]
    (found,) = contributions(trained, [orders], ["a"], 0)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3), abs=0.035)


def test_a_loss_that_is_not_finite_names_its_part() -> None:
    trained = losses([1.0, 2.0], [1, 1])
    with pytest.raises(DocumentError, match="q3: expected a finite loss without it"):
        contributions(trained, [[losses([float("nan"), 1.0], [1, 1])]], ["q3"], 0)


# The pass and the command


def test_the_same_run_and_data_give_the_same_bytes(state: RunDirectory, text_file: Path) -> None:
    first = explain(state, text_file)
    assert first.to_json() == explain(state, text_file).to_json()
    assert first.n_rows == 3 and first.n_tokens < state.read(TrainedGenerator).result.n_eval_tokens
    content = explanation_json(first)
    assert content["parts"][0]["share_of_gain"] == first.parts[0].ablation.value / first.gain.value


def test_what_is_scored_is_what_was_frozen(state: RunDirectory, text_file: Path) -> None:
    subject = subject_of(state)
    arrays = load_file(state.files.get(state.read(FrozenAdapter).arrays))
    found = decode(subject, Change())
    assert all(torch.allclose(found[path], arrays[path], rtol=1e-5, atol=1e-6) for path in arrays)
    assert subject.probabilities.shape == (1, 2**subject.layout.ansatz.n_qubits)
    assert state.read(Measurement).probabilities is not None


def test_other_data_and_runs_that_are_not_trained_are_refused(
    cli: Cli, state: RunDirectory, llama: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else " * 200)
    assert "expected the data of the training, found other data" in cli.refuses(
        "explain", state.path, "--data", other
    )
    assert not state.has(Explanation)
    planned = plan(llama, tmp_path / "planned")
    assert "run qpa train first" in cli.refuses("explain", planned.path, "--data", other)
    with pytest.raises(DataError):
        explain(state, other)


def test_a_generator_without_chunks_is_explained_by_its_adapter_alone(
    llama: Path, text_file: Path, tmp_path: Path, state: RunDirectory
) -> None:
    run = plan(llama, tmp_path / "run", generator="direct", circuits=None, layers=None)
    train(run, text_file, max_steps=2)
    found = explain(run, text_file)
    assert {part.kind for part in found.parts} == {"layer", "module type"}
    assert found.gain.value == pytest.approx(found.base_loss - found.trained_loss)
    assert "as the generator direct has them" in left_out(run.read(WeightLayout))
    assert left_out(state.read(WeightLayout)) == ""


def test_an_explanation_is_shown_and_is_stale_when_the_run_is_trained_again(
    cli: Cli, state: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(state.path, path)
    few = ("--rows", "4", "--permutations", "1")
    code, out, err = cli("explain", path, "--data", text_file, *few)
    assert code == 0, err
    assert "scores the evaluation split, up to 4 rows," in err
    run = RunDirectory(path)
    found = run.read(Explanation)
    for row in (*parts_rows(found), *shares_rows(found)):
        assert row[0] in " ".join(out.split())
    code, out, err = cli("explain", path, "--data", text_file, *few, "--json")
    assert json.loads(out)["gain"]["value"] == found.gain.value
    assert cli("report", path)[0] == 0
    page = (path / "report.html").read_text()
    assert "What the parts contribute" in page and "q1 (layer)" in page
    assert "Probability by layer and module type" in page
    train(run, text_file, max_steps=1)
    assert not run.has(Explanation)


def test_replacing_a_scorers_rows_keeps_their_order(state: RunDirectory, text_file: Path) -> None:
    documents = state.read_through(FrozenAdapter)
    step = ExplainGenerator(data=(str(text_file),))
    context = PassContext(0, state.files, documents)
    scorer = Scorer.of(state.read(AdapterSpec), state.read(TrainedGenerator), step, context)
    few = scorer.with_rows(3, 5)
    places = [scorer.rows.index(row) for row in few.rows]
    assert places == sorted(places) and len(few.rows) == 3
    assert scorer.with_rows(10**6, 5) is scorer is scorer.with_rows(None, 5)
    assert replace(few, rows=scorer.rows) == scorer
