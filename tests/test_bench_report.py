"""From lines to a table, a plot and losses at the same size."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from qpa.bench.report import best_with_at_most, interpolate, markdown_table, read_results, write_report
from qpa.errors import DataError, DiskFullError

FRONTIER = [(100, 4.0), (400, 3.0), (800, 2.9)]
SETTING = {"steps": 2}


def run(
    method: str, n_trained: int, rate: float, seed: int, validation: float | None, test: float | None
) -> Any:
    return {
        "kind": "run",
        "method": method,
        "label": f"n={n_trained}",
        "knobs": [["n", n_trained]],
        "rate": rate,
        "seed": seed,
        "n_trained": n_trained,
        "validation": validation,
        "test": test,
        "diverged": test is None,
        "train_s": 1.5 + seed,
        "setup_s": 0.1,
        "peak_mb": 500.0 + seed,
        "state_bytes": 12 * n_trained,
        "file_bytes": 4000,
        "exports_to_lora": method == "ours",
    }


LINES = [
    {"kind": "budget", "budget": "5%", "n_trained": 110},
    {"kind": "budget", "budget": "20%", "n_trained": 400},
    {"kind": "unmet", "method": "theirs", "budget": "5%", "label": "n=400", "n_trained": 400},
    {"kind": "base", "validation": 5.0, "test": 5.5},
    run("ours", 100, 1e-3, 0, 3.0, 1.0),
    run("ours", 100, 1e-2, 0, 2.0, 3.1),
    run("ours", 100, 1e-1, 0, None, None),
    run("ours", 100, 1e-2, 1, 2.0, 3.3),
    run("ours", 400, 1e-2, 0, 2.0, 2.5),
    run("theirs", 400, 1e-2, 0, 2.0, 2.75),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write(tmp_path / "results.jsonl", LINES)
    return tmp_path


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**line, "setting": SETTING}) + "\n" for line in lines))


def test_losses_are_interpolated_in_log_parameters_within_the_range_only() -> None:
    assert interpolate(FRONTIER, 100) == 4.0
    assert interpolate(FRONTIER, 800) == 2.9
    assert interpolate(FRONTIER, 200) == pytest.approx(3.5)
    assert interpolate(FRONTIER, 99) is None
    assert interpolate(FRONTIER, 801) is None
    assert interpolate([], 100) is None


def test_beyond_its_largest_size_a_peer_keeps_that_loss_and_below_its_smallest_it_has_none() -> None:
    assert best_with_at_most(FRONTIER, 10_000) == 2.9
    assert best_with_at_most(FRONTIER, 200) == pytest.approx(3.5)
    assert best_with_at_most(FRONTIER, 99) is None
    assert best_with_at_most([], 100) is None


def test_a_row_is_the_seeds_of_the_rate_that_validation_chose(results: Path) -> None:
    row = read_results([results]).rows[0]
    assert (row.method, row.n_trained, row.rate, row.n_seeds, row.at_edge) == ("ours", 100, 1e-2, 2, False)
    assert row.mean == pytest.approx(3.2)
    assert row.deviation == pytest.approx(math.sqrt(0.02))
    assert (row.train_s, row.peak_mb) == (2.0, 501.0)


def test_the_report_is_drawn_from_the_results_alone(results: Path) -> None:
    text = write_report([results], results)
    table = (results / "table.md").read_text()
    assert "![](loss.png)" in table
    assert text in table
    assert (results / "loss.png").read_bytes().startswith(b"\x89PNG")
    first = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert first == [
        "ours", "n=100", "5%", "100", "0.01", "2", "3.2000", "0.1414", "24.533", "2.0", "501", "4.0", "yes",
    ]  # fmt: skip
    assert "- theirs cannot meet 5% (110): its nearest size is 400." in text
    assert "The base model's test loss is 5.5000." in text


def test_a_full_disk_leaves_the_plot_as_it_was(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "loss.png").write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"loss\.png: expected room for at least [\d,]{5,} bytes"):
        write_report([results], tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == b"older"


def test_the_frontier_names_the_best_at_each_budget(results: Path) -> None:
    lines = write_report([results], results).splitlines()
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[-2:]}
    inside = 3.2 + math.log(1.1) / math.log(4) * (2.5 - 3.2)
    assert rows["5%"] == ["110", f"{inside:.4f}", "-", "ours"]
    assert rows["20%"] == ["400", "2.5000", "2.7500", "ours"]


def test_a_smaller_size_competes_for_a_budget_and_a_larger_one_only_serves_it(tmp_path: Path) -> None:
    lines = [
        {**LINES[1], "n_trained": 380},
        run("smaller", 20, 1e-2, 0, 2.0, 2.5),
        run("larger", 400, 1e-2, 0, 2.0, 2.0),
        run("too-large", 600, 1e-2, 0, 2.0, 1.0),
    ]
    write(tmp_path / "results.jsonl", lines)
    cells = write_report([tmp_path], tmp_path).splitlines()[-1].split("|")[3:7]
    assert [cell.strip() for cell in cells] == ["<2.5000", ">2.0000", "-", "smaller"]


def test_a_seed_that_diverged_is_not_averaged_away(tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", [*LINES, run("theirs", 400, 1e-2, 1, None, None)])
    row = read_results([tmp_path]).rows[-1]
    assert (row.mean, row.n_seeds) == (None, 2)
    assert "diverged" in write_report([tmp_path], tmp_path)


def test_several_benches_of_one_setting_make_one_report(results: Path, tmp_path: Path) -> None:
    write(tmp_path / "more" / "results.jsonl", [run("more", 300, 1e-2, 0, 2.0, 2.6)])
    assert [row.method for row in read_results([results, tmp_path / "more"]).rows] == [
        "ours", "ours", "theirs", "more",
    ]  # fmt: skip


def test_benches_of_two_settings_are_not_mixed(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "results.jsonl"
    other.parent.mkdir()
    other.write_text(json.dumps({**LINES[-1], "setting": {"steps": 3}}) + "\n")
    with pytest.raises(DataError, match="another setting"):
        read_results([results, other.parent])


def test_results_without_a_run_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", LINES[:4])
    with pytest.raises(DataError, match="at least one run"):
        read_results([tmp_path])


def test_tables_are_aligned_with_numbers_on_the_right() -> None:
    table = markdown_table([("name", "n"), ("a", "1,000"), ("longer", "-")])
    assert table.splitlines() == [
        "| name   |     n |",
        "| ------ | ----: |",
        "| a      | 1,000 |",
        "| longer |     - |",
    ]


def test_methods_stand_against_ours_near_their_own_sizes_only(tmp_path: Path) -> None:
    lines = [LINES[1]]
    for method, n_trained, loss in (
        ("qpa", 1000, 2.0),
        ("qpa", 2000, 1.5),
        ("qpa:random", 1010, 2.1),
        ("lora", 500, 3.0),
        ("lora", 2000, 1.0),
    ):
        lines += [run(method, n_trained, rate, 0, 1.0 + rate, loss) for rate in (1e-2, 2e-2)]
    write(tmp_path / "results.jsonl", lines)
    text = write_report([tmp_path], tmp_path)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text[text.index("## Against qpa") :].splitlines()
        if line.startswith("|")
    }
    assert rows["method"] == ["1,000", "2,000"]
    assert rows["qpa:random"] == ["+0.1000", "-"]
    middle = 3.0 + math.log(1010 / 500) / math.log(4) * (1.0 - 3.0)
    assert rows["lora"] == [f"{middle - 2.0:+.4f}", "-0.5000"]


def test_the_report_shows_every_rate_that_was_searched(results: Path) -> None:
    text = write_report([results], results)
    section = text[text.index("## Learning rates") : text.index("## Frontier")]
    row = next(line for line in section.splitlines() if line.startswith("| ours ") and " 100 " in line)
    assert row.count("|") >= 4 and any(cell.strip().startswith("2.") for cell in row.split("|")[3:])
