"""One run of the bench: what is measured is what happened."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qpa.bench.fixed_basis import FixedBasis
from qpa.bench.method import Configuration, Method
from qpa.bench.methods import METHODS
from qpa.bench.peft_methods import PEFT_METHODS
from qpa.bench.ranked import RANKED
from qpa.bench.setting import Setting
from qpa.bench.sizes import choose, size_ratio
from qpa.bench.task import Task, load_task
from qpa.bench.trial import Measured, batches, learning_rate_scale, losses, run_trial
from qpa.circuits.ansatz import ANSATZE
from qpa.errors import DataError, OptionError
from tests.fake_methods import TrainedHead, UnusedAdapter

OTHER_CIRCUITS = [f"state:{name}" for name in ANSATZE if name != "ry-cnot-chain"]
OTHERS = ("lora-xs", "lora-sb", "cayley", "cayley-shared", "qtha", "qtha:linear", *OTHER_CIRCUITS)
PEERS = {**PEFT_METHODS, **RANKED, **{name: METHODS[name] for name in OTHERS}}
BUDGETS = (400, 2500)


@pytest.fixture(scope="module")
def task(llama: Path, text_file: Path) -> Task:
    return load_task(Setting(str(llama), text_file, max_steps=2, batch_size=2, max_length=32))


def measure(task: Task, method: Method, rate: float = 1e-2, seed: int = 0) -> Measured:
    (configuration, *_) = method.sizes(task.base, [BUDGETS[-1]])
    return run_trial(task, method, configuration, rate, seed)


def test_an_adapter_nobody_looks_at_scores_exactly_the_base_loss(task: Task) -> None:
    measured = measure(task, UnusedAdapter())
    assert (measured.validation, measured.test) == losses(task, task.base.load())


def test_two_names_of_a_method_score_the_same(task: Task) -> None:
    lora = PEFT_METHODS["lora"]
    first, second = measure(task, lora), measure(task, replace(lora, name="lora-again"))
    assert (first.validation, first.test) == (second.validation, second.test)
    assert (first.validation, first.test) != losses(task, task.base.load())


def test_what_is_trained_is_counted_and_not_believed(task: Task) -> None:
    measured = measure(task, UnusedAdapter(n_trained=7, n_declared=1000))
    assert (measured.n_trained, measured.state_bytes) == (7, 7 * 12)


def test_the_saved_adapter_is_weighed(task: Task) -> None:
    small, large = (measure(task, UnusedAdapter(n_trained=n)).file_bytes for n in (10, 1010))
    assert large - small == pytest.approx(4000, abs=32)  # the header has more digits


def test_a_run_that_diverges_is_recorded_without_losses(task: Task) -> None:
    measured = measure(task, TrainedHead(), rate=math.inf)
    assert (measured.diverged, measured.validation, measured.test) == (True, None, None)
    assert not measure(task, TrainedHead(), rate=1e-4).diverged


def test_training_with_another_seed_sees_other_rows(task: Task) -> None:
    assert measure(task, TrainedHead(), seed=0).test != measure(task, TrainedHead(), seed=1).test


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_counted_as_predicted_trains_and_saves(
    task: Task, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    method = PEERS[name]
    sizes = method.sizes(task.base, BUDGETS)
    assert sizes, capsys.readouterr().err
    for configuration in (sizes[0], sizes[-1]):
        measured = run_trial(task, method, configuration, method.rates[0], seed=0)
        assert measured.n_trained == configuration.n_trained
        assert not measured.diverged
        assert measured.file_bytes > 0
        assert (measured.validation, measured.test) != losses(task, task.base.load())


@pytest.mark.parametrize("name", ["state", *OTHER_CIRCUITS])
def test_states_of_all_circuits_meet_the_same_budgets(task: Task, name: str) -> None:
    signed = METHODS[name.replace("state", "state:signed", 1)]
    for method, budget in ((METHODS[name], 57), (METHODS[name], 265), (signed, 130), (signed, 265)):
        configuration = choose(method.sizes(task.base, [budget]), budget)
        assert configuration is not None and size_ratio(configuration.n_trained, budget) < 1.2


def test_unilora_meets_every_budget_exactly(task: Task) -> None:
    sizes = PEFT_METHODS["unilora"].sizes(task.base, BUDGETS)
    assert tuple(configuration.n_trained for configuration in sizes) == BUDGETS


@pytest.mark.parametrize(
    "name", [name for name in PEERS if not name.startswith(("unilora", "tinylora", "vblora"))]
)
def test_a_peer_that_has_not_trained_changes_nothing(task: Task, name: str) -> None:
    method = PEERS[name]
    configuration = choose(method.sizes(task.base, BUDGETS), BUDGETS[-1])
    assert configuration is not None
    attached = method.attach(task.base, configuration, rate=1e-2, seed=0)
    assert losses(task, attached.model.eval())[1] == pytest.approx(
        losses(task, task.base.load())[1], abs=1e-4
    )


def test_a_size_that_peft_refuses_is_no_candidate_and_said_in_one_line(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    method = replace(PEFT_METHODS["fourierft"], candidates=lambda shapes, budget: [{"n_frequency": 10**9}])
    assert method.sizes(task.base, BUDGETS) == []
    error = capsys.readouterr().err
    assert error.startswith("note: fourierft cannot be built at n_frequency=1000000000: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("source", ["weight", "gradient"])
def test_a_fixed_basis_is_orthogonal_to_nothing_it_should_span(task: Task, source: str) -> None:
    method = FixedBasis("basis", source)  # type: ignore[arg-type]
    model = method.attach(task.base, Configuration("r=4", (("r", 4),), 0), rate=1e-2, seed=0).model
    core = model.get_submodule(task.base.target_modules[0])
    identity = torch.eye(4)
    torch.testing.assert_close(core.left.T @ core.left, identity, atol=1e-4, rtol=0)
    gram = core.right @ core.right.T
    torch.testing.assert_close(gram, torch.diag(gram.diag()), atol=1e-3, rtol=1e-4)


def test_the_rate_warms_up_and_ends_near_zero() -> None:
    scales = [learning_rate_scale(step, 200) for step in range(200)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == scales[10] == 1.0
    assert scales[-1] == pytest.approx(1 / 190)
    assert [learning_rate_scale(0, 1), learning_rate_scale(1, 2)] == [1.0, 1.0]


def test_batches_pass_over_all_rows_before_repeating_one() -> None:
    rows = torch.arange(6).view(6, 1)
    seen = [
        row for batch in batches(rows, batch_size=2, n_steps=6, seed=3) for row in batch.flatten().tolist()
    ]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_the_splits_do_not_overlap_and_have_whole_blocks(task: Task, llama: Path, text_file: Path) -> None:
    text = torch.cat([task.base.train_rows, task.validation, task.test])
    assert text.shape[1] == 32
    assert len({tuple(row.tolist()) for row in text}) == len(text)
    half = load_task(Setting(str(llama), text_file, max_length=32, test_share=0.5))
    assert len(half.test) == round(len(task.test) / 2)
    assert half.facts != task.facts


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"test_share": 0.0}, "test_share"),
        ({"test_share": math.nan}, "test_share"),
    ],
)
def test_an_option_out_of_range_is_named(
    llama: Path, text_file: Path, change: dict[str, float], subject: str
) -> None:
    with pytest.raises(OptionError, match=f"^{subject}: "):
        load_task(replace(Setting(str(llama), text_file), **change))


def test_a_text_without_a_block_for_each_split_is_refused(llama: Path, text_file: Path) -> None:
    with pytest.raises(DataError, match="lower `max_length`"):
        load_task(Setting(str(llama), text_file, max_length=2000))


@pytest.mark.parametrize("name", ["lora", "lora-xs", "lora-sb"])
def test_conv1d_layers_of_gpt2_are_adapted_too(gpt2: Path, text_file: Path, name: str) -> None:
    task = load_task(Setting(str(gpt2), text_file, max_steps=2, batch_size=2, max_length=32))
    configuration = choose(PEERS[name].sizes(task.base, [500]), 500)
    assert configuration is not None
    measured = run_trial(task, PEERS[name], configuration, rate=1e-2, seed=0)
    assert measured.n_trained == configuration.n_trained
    assert (measured.validation, measured.test) != losses(task, task.base.load())
