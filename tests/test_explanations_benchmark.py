"""The benchmark of explanations: runs are made once, and their table has means and halves of ranges."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import explanations
from qpa.documents import Explanation
from qpa.store.run_directory import RunDirectory

CASE = "state-control"


def test_runs_are_explained_once_and_their_table_has_means_over_the_seeds(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "SETTING", {"max_length": 32, "batch_size": 2})
    words = ["explanations", "--model", llama, "--data", text_file, "--out", tmp_path, "--cases", CASE]
    words += ["--seeds", "0,1", "--steps", "2", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    explanations.main()
    table = (tmp_path / explanations.TABLE).read_bytes()
    runs = [RunDirectory(tmp_path / f"{CASE}-{seed}") for seed in (0, 1)]
    made = [run.read(Explanation) for run in runs]
    rows = {row[0]: row[1:] for row in explanations.table_of(made)}
    gains = [one.gain.value for one in made]
    assert gains[0] != gains[1]
    mean, half = sum(gains) / 2, (max(gains) - min(gains)) / 2
    assert rows["all together"] == (f"{mean:+.3f} +-{half:.3f}", "100%", "")
    assert [*rows] == ["all together", *(part.name for part in made[0].parts)]
    text = re.sub(" +", " ", table.decode())
    losses = ", ".join(f"{one.trained_loss:.3f}" for one in made)
    assert text.startswith(f"## {CASE}: 2 runs, losses {losses}, of {made[0].n_tokens} tokens")
    assert all(f"| {name} | {row[0]} |".replace("  ", " ") in text for name, row in rows.items())
    # What is there already is read, and not made again.
    (tmp_path / explanations.TABLE).unlink()
    explanations.main()
    assert (tmp_path / explanations.TABLE).read_bytes() == table
    assert [run.written_digest(Explanation) for run in runs] == [one.digest for one in made]
