"""The benchmark of contexts: every way trains and is scored, at about the same number of trained numbers."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import fast_weights


def test_every_way_has_its_line_and_its_row(llama: Path, text_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{n} + 1?", "answer": f"{n + 1}"}) + "\n" for n in range(200))
    )
    out = tmp_path / "lines.jsonl"
    arguments = ["--model", str(llama), "--tasks", f"lines={text_file}", f"sums={rows}"]
    arguments += ["--unseen", f"again={text_file}", "--out", str(out), "--budgets", "60", "--rates", "0.05"]
    arguments += ["--seeds", "0", "--steps", "4", "--batch-size", "2", "--max-length", "32"]
    options = fast_weights.parse([*arguments, "--methods", "shared", "programmed", "prompt"])
    fast_weights.run(options)
    table = fast_weights.run(fast_weights.parse(arguments))
    lines = {line["method"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert len(out.read_text().splitlines()) == len(lines) == len(fast_weights.WAYS)
    for name, line in lines.items():
        assert f"| {name} " in table
        assert line["test"].keys() == {"lines", "sums"}
        assert 40 < line["n_trained"] < 80, name
        assert all(loss < line["base"][task] for task, loss in line["test"].items())
    unseen = {name: set(line["unseen"]["again"]) for name, line in lines.items()}
    assert unseen["shared"] == {"all"} and unseen["apart"] == unseen["programmed"] == {"lines", "sums"}
    assert unseen["prompt"] == {"lines", "sums", "itself"}
