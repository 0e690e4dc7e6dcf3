"""The bench as a whole: what is run, what is kept, what is chosen by what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qpa.bench.ledger import Book, read_lines
from qpa.bench.method import Configuration, Method
from qpa.bench.methods import METHODS, find_methods
from qpa.bench.schedule import Cell, Grid, Trial, best_rate, missing_trials, plan_cells, record_plan
from qpa.bench.setting import Setting
from qpa.bench.sizes import Budget, choose, parse_budgets
from qpa.bench.task import Task, load_task
from qpa.bench.workers import Workers
from qpa.errors import DataError, OptionError
from tests.fake_methods import TrainedHead, UnusedAdapter

FACTS: dict[str, object] = {"steps": 2}
CONFIGURATION = Configuration("its size", (), 10)


@pytest.fixture(scope="module")
def task(llama: Path, text_file: Path) -> Task:
    return load_task(Setting(str(llama), text_file, max_steps=2, batch_size=2, max_length=32))


Bench = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def bench(task: Task, tmp_path: Path) -> Bench:
    """Return a function that runs methods at a budget of 10 and returns (runs left, what was said)."""

    def run(*methods: Method, n_seeds: int = 2, **options: Any) -> tuple[int, list[str]]:
        said: list[str] = []
        budgets = (Budget("10", 10),)
        with Book.opened(tmp_path, task.facts) as book:
            cells, unmet = plan_cells(task.base, methods, budgets)
            record_plan(book, budgets, unmet)
            n_left = Grid(task, cells, book, n_seeds, say=said.append, **options).run()
        return n_left, said

    return run


def runs(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path / "results.jsonl") if line["kind"] == "run"]


def test_a_cell_is_three_rates_with_seed_0_and_then_the_other_seeds(bench: Bench, tmp_path: Path) -> None:
    method = UnusedAdapter()
    assert bench(method, n_seeds=3)[0] == 0
    assert method.attached[:3] == [(rate, 0) for rate in method.rates]
    assert [seed for _, seed in method.attached[3:]] == [1, 2]
    assert len({rate for rate, _ in method.attached[3:]}) == 1
    assert [(run["rate"], run["seed"]) for run in runs(tmp_path)] == method.attached


def test_a_second_start_makes_no_run_again(bench: Bench, tmp_path: Path) -> None:
    bench(UnusedAdapter())
    before = (tmp_path / "results.jsonl").read_bytes()
    method = UnusedAdapter()
    assert bench(method) == (0, [])
    assert method.attached == []
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_after_a_kill_within_a_line_only_that_run_is_made_again(bench: Bench, tmp_path: Path) -> None:
    bench(UnusedAdapter())
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:25])
    method = UnusedAdapter()
    assert bench(method)[0] == 0
    assert len(method.attached) == 2
    assert [without_costs(line) for line in path.read_bytes().splitlines()] == [
        without_costs(line) for line in whole.splitlines()
    ]


def without_costs(line: bytes) -> dict[str, Any]:
    content = json.loads(line)
    return {name: value for name, value in content.items() if name not in ("train_s", "setup_s", "peak_mb")}


def test_one_more_seed_is_one_more_run(bench: Bench) -> None:
    bench(UnusedAdapter(), n_seeds=2)
    method = UnusedAdapter()
    bench(method, n_seeds=3)
    assert [seed for _, seed in method.attached] == [2]


def test_no_run_starts_after_the_deadline_and_what_is_left_is_counted(bench: Bench) -> None:
    method = UnusedAdapter()
    assert bench(method, n_seeds=3, deadline_s=-math.inf)[0] == 5
    assert method.attached == []


def test_a_line_says_the_counted_size_and_not_the_declared(bench: Bench, tmp_path: Path) -> None:
    _, said = bench(UnusedAdapter(n_trained=12345, n_declared=10))
    assert {run["n_trained"] for run in runs(tmp_path)} == {12345}
    assert said[0].startswith("[1/4] unused its size 12,345 seed 0 lr 0.001: ")


def test_a_rate_that_diverges_is_recorded_and_not_chosen(bench: Bench, tmp_path: Path) -> None:
    method = TrainedHead()
    assert bench(method)[0] == 0
    diverged = [run["rate"] for run in runs(tmp_path) if run["diverged"]]
    assert diverged == [math.inf]
    assert runs(tmp_path)[-1]["rate"] != math.inf


def test_a_method_that_breaks_is_skipped_with_one_line_and_the_others_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nsuch thing")

    broken, whole = TrainedHead(name="broken"), UnusedAdapter()
    monkeypatch.setattr(TrainedHead, "attach", breaks)
    n_left, said = bench(broken, whole)
    assert n_left == 4
    assert said[0] == "error: broken its size: no; its other runs are skipped"
    assert len(whole.attached) == 4


def test_workers_give_the_results_of_one_process(task: Task, tmp_path: Path) -> None:
    found = []
    for n in (1, 2):
        with Book.opened(tmp_path / str(n), task.facts) as book:
            cells, _ = plan_cells(task.base, find_methods(["unilora"]), [Budget("50", 50)])
            assert Grid(task, cells, book, n_seeds=1, workers=Workers(n), say=lambda line: None).run() == 0
        found.append({run["rate"]: run["test"] for run in runs(tmp_path / str(n))})
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_the_validation_loss_chooses_the_rate_and_the_test_loss_does_not(tmp_path: Path) -> None:
    cell = Cell(UnusedAdapter(), CONFIGURATION)
    scores = {1e-3: (3.0, 1.0), 1e-2: (2.0, 5.0), 1e-1: (2.5, 2.0)}
    with Book.opened(tmp_path, FACTS) as book:
        for rate, (validation, test) in scores.items():
            assert best_rate(cell, book) is None
            book.write({**Trial(cell, rate, 0).line, "validation": validation, "test": test})
        assert best_rate(cell, book) == 1e-2
        assert missing_trials(cell, book, n_seeds=3) == [Trial(cell, 1e-2, 1), Trial(cell, 1e-2, 2)]


def test_a_cell_whose_rates_all_diverge_is_done(tmp_path: Path) -> None:
    cell = Cell(UnusedAdapter(), CONFIGURATION)
    with Book.opened(tmp_path, FACTS) as book:
        for rate in cell.method.rates:
            book.write({**Trial(cell, rate, 0).line, "validation": None, "test": None})
        assert missing_trials(cell, book, n_seeds=3) == []


def test_the_nearest_size_in_log_parameters_serves_a_budget_if_near_enough(task: Task) -> None:
    sizes = [Configuration(str(n), (), n) for n in (0, 100, 200)]
    assert choose(sizes, 145) == sizes[2]  # 145 / 100 > 200 / 145
    assert choose(sizes, 140) == sizes[1]
    assert choose([], 140) is None
    budgets = (Budget("a", 95), Budget("b", 105), Budget("c", 150))
    cells, unmet = plan_cells(task.base, [UnusedAdapter(n_declared=100)], budgets)
    assert len(cells) == 1
    assert [(line["budget"], line["n_trained"]) for line in unmet] == [("c", 100)]


def test_budgets_are_shares_of_lora_or_numbers() -> None:
    assert parse_budgets(["25%", "1850"], 23120) == (Budget("25%", 5780), Budget("1850", 1850))
    for wrong in ("0%", "0", "-3", "x", "nan", "inf%"):
        with pytest.raises(OptionError, match=r"^budgets: "):
            parse_budgets([wrong], 23120)


def test_results_of_another_setting_are_refused(tmp_path: Path) -> None:
    with Book.opened(tmp_path, {"steps": 200}) as book:
        book.write({"kind": "base"})
    with pytest.raises(OptionError, match="steps 2, found steps 200"), Book.opened(tmp_path, FACTS):
        pass


def test_two_processes_cannot_write_one_book(tmp_path: Path) -> None:
    with (
        Book.opened(tmp_path, FACTS),
        pytest.raises(OptionError, match="another qpa bench"),
        Book.opened(tmp_path, FACTS),
    ):
        pass


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "base", "setting": {}}\nnonsense\n')
    with pytest.raises(DataError, match=r"results\.jsonl, line 2"):
        read_lines(path)


def test_a_byte_order_mark_before_the_results_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"kind": "base", "setting": {}}\n')
    assert read_lines(path) == [{"kind": "base", "setting": {}}]


def test_runs_recorded_when_circuits_were_called_heads_are_found_again() -> None:
    recorded = Path(__file__).parents[1] / "docs" / "results" / "bard" / "results.jsonl"
    assert '"heads"' in recorded.read_text()
    lines = [line for line in read_lines(recorded) if line["kind"] == "run" and line["method"] == "qpa"]
    book = Book(recorded, {}, lines)
    for line in lines:
        knobs = tuple((name, value) for name, value in line["knobs"])
        label = ", ".join(f"{name} {value}" for name, value in knobs)
        cell = Cell(METHODS["qpa"], Configuration(label, knobs, line["n_trained"]))
        assert "circuits" in dict(knobs)
        assert book.find(Trial(cell, line["rate"], line["seed"]).line) == line


def test_methods_are_found_by_name_and_a_typo_gets_a_hint() -> None:
    assert [method.name for method in find_methods(["vera", "lora", "vera"])] == ["vera", "lora"]
    with pytest.raises(OptionError, match="lora-xs"):
        find_methods(["lora_xs"])


def test_every_method_is_known_by_its_own_name_and_has_three_ascending_rates() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert len(method.rates) == 3
        assert list(method.rates) == sorted(set(method.rates))


def test_an_alias_is_a_method_of_its_own(bench: Bench, tmp_path: Path) -> None:
    bench(UnusedAdapter(), replace(UnusedAdapter(), name="alias"))
    tests = {(run["method"], run["test"]) for run in runs(tmp_path)}
    assert {method for method, _ in tests} == {"unused", "alias"}
    assert len({test for _, test in tests}) == 1
