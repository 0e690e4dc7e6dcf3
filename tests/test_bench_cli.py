"""`qpa bench` as a user types it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.command_line import Cli

SMALL = ["--max-steps", "2", "--batch-size", "2", "--max-length", "32", "--device", "cpu"]


Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a function that runs `qpa bench`: exit code, stdout, stderr."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY", ""))
    return partial(cli, "bench")


def test_a_bench_prints_its_table_and_is_redrawn_from_its_directory(
    cli: Bench, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ["--model", llama, "--data", text_file, "--out", tmp_path, *SMALL]
    code, out, err = cli(*options, "--methods", "lora,ia3", "--budgets", "25%,40", "--seeds", "2")
    assert code == 0, err
    assert "[1/4] lora r=1 1,856 seed 0 lr 0.003: " in err
    assert "- lora cannot meet 40 (40): its nearest size is 1,856." in out
    drawn = {name: (tmp_path / name).read_bytes() for name in ("table.md", "loss.png", "results.jsonl")}
    for name in ("table.md", "loss.png"):
        (tmp_path / name).unlink()
    assert cli("--report", "--out", tmp_path)[:2] == (0, out)
    assert {name: (tmp_path / name).read_bytes() for name in drawn} == drawn
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "results.jsonl", tmp_path / "other")
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(line for line in lines if '"lora"' not in line))
    assert "\n| lora" not in cli("--report", "--out", tmp_path)[1]
    assert "\n| lora" in cli("--report", "--out", tmp_path, "--beside", tmp_path / "other")[1]


def test_out_of_time_is_no_failure_and_the_same_command_goes_on(
    cli: Bench, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ["--model", llama, "--data", text_file, "--out", tmp_path, *SMALL]
    options += ["--methods", "ia3", "--budgets", "320", "--seeds", "1"]
    code, out, err = cli(*options, "--minutes", "0")
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == "3 runs are left; the same command goes on"
    code, out, err = cli(*options)
    assert code == 0
    assert err.count("] ia3") == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "lorra"], "error: --methods: expected known methods, found lorra"),
        (["--methods", ""], "error: --methods: "),
        (["--budgets", "0%"], "error: --budgets: "),
        (["--budgets", ","], "error: --budgets: "),
        (["--data", "missing.txt"], "error: missing.txt: "),
        (["--eval", "missing.txt"], "error: missing.txt: "),
        (["--model", "./missing"], "error: ./missing: "),
        (["--seeds", "0"], "error: --seeds: "),
        (["--workers", "0"], "error: --workers: "),
        (["--steps", "0"], "error: --max-steps: "),
        (["--target-modules", "nothing"], "error: --targets: "),
        (["--device", "abacus"], "error: --device: "),
    ],
)
def test_bad_input_is_one_line(
    cli: Bench, llama: Path, text_file: Path, tmp_path: Path, wrong: list[str], message: str
) -> None:
    options = ["--model", llama, "--data", text_file, "--methods", "lora", "--out", tmp_path]
    code, out, err = cli(*options, *SMALL, *wrong)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(message)


def test_the_old_spellings_are_understood(cli: Bench, llama: Path, text_file: Path, tmp_path: Path) -> None:
    both = ["--model", llama, "--data", text_file, "--methods", "lora", "--budgets", "25%", "--seeds", "1"]
    both += ["--batch-size", "2", "--device", "cpu", "--out", tmp_path]
    old = ["--steps", "2", "--length", "32", "--eval", text_file, "--target-modules", "q_proj"]
    new = ["--max-steps", "2", "--max-length", "32", "--eval-data", text_file, "--targets", "q_proj"]
    assert cli(*both, *old)[0] == 0
    recorded = (tmp_path / "results.jsonl").read_bytes()
    assert cli(*both, *new)[0] == 0
    assert (tmp_path / "results.jsonl").read_bytes() == recorded


def test_a_report_of_nothing_and_a_bench_of_nothing_are_one_line(cli: Bench, tmp_path: Path) -> None:
    for options in (["--report"], []):
        code, out, err = cli(*options, "--out", tmp_path)
        assert (code, out, err.count("\n")) == (1, "", 1), err
