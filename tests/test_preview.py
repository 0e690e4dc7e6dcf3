"""qpa preview: what the model gets, before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
from rich.console import Console

from qpa.training.data.splits import preference_splits
from qpa.training.objectives.objective import OBJECTIVES
from tests.chat_styles import STYLES
from tests.test_train_generator import plan, train

TALK = [{"role": "user", "content": "Legs?"}, {"role": "assistant", "content": "Four."}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Return a file of conversations, one of which is longer than the others."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"messages": TALK} for _ in range(20)]
    rows[7] = {"messages": [*TALK, {"role": "user", "content": "Sure? " * 30}, TALK[1]]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    """Return a tiny Llama without weights, whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(llama, path, ignore=shutil.ignore_patterns("*.safetensors"))
    STYLES["llama-3"].tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def configured(tmp_path, model, chats):
    """Return a configuration file."""
    path = tmp_path / "chats.yaml"
    path.write_text(f"model: {model}\ndata: {chats}\ntrain:\n  max_length: 64\n")
    return path


SHOWN = """row 1: 17 tokens, 6 carry the loss
<|begin_of_text|><|start_header_id|>user<|end_header_id|>

Legs?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[[Four.<|eot_id|>]]
"""


def test_rows_are_shown_with_brackets_around_what_carries_the_loss(cli, configured):
    code, out, err = cli("preview", configured, "--rows", "1")
    assert (code, err) == (0, "")
    assert out.startswith(f"{configured}: 1 of 18 rows; [[ ]]: carries the loss\n")
    assert SHOWN.partition(": ")[0] in out and SHOWN.partition("\n")[2] in out
    assert "rows that were cut" in out and "tokens with a loss" in out


def test_rows_are_shown_in_colours_on_a_terminal(cli, configured, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = cli("preview", configured, "--rows", "1")[1]
    assert "\x1b[1;32mFour." in out and "[[" not in out and "\x1b[2m<|begin_of_text|>" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[Four." in cli("preview", configured, "--rows", "1")[1]


def test_options_count_more_than_the_file(cli, configured):
    def shown(*options):
        return json.loads(cli("preview", configured, "--json", *options)[1])

    found = shown()
    assert (len(found["rows"]), found["n_rows"], found["max_length"]) == (3, 18, 64)
    assert found["summary"]["shape"] == "messages"
    first = found["rows"][0][0]
    assert [piece["has_loss"] for piece in first] == [False, True]
    assert first[1]["text"] == "Four.<|eot_id|>"
    assert shown("--set", "train.max_length=32")["max_length"] == 32
    assert shown("--max-length", "48", "--set", "train.max_length=32")["max_length"] == 48
    assert len(shown("--loss-on", "all")["rows"][0][0]) == 1
    packed = shown("--packing")
    assert packed["n_rows"] < 18 and len(packed["rows"][1]) == 2
    assert packed["summary"]["training"]["n_unpacked"] == 18


def test_a_packed_preview_counts_its_parts(cli, configured):
    out = cli("preview", configured, "--packing")[1]
    assert "row 2, part 1 of 2" in out and "rows before packing" in out and "filled by tokens" in out


class Pairs:
    """An objective from outside, of preferences."""

    name = "pairs"

    def __init__(self, options, tokenizer):
        self.options, self.tokenizer = options, tokenizer

    def rows(self, seed):
        return preference_splits(self.options, self.tokenizer, seed)


@pytest.fixture
def pairs_objective():
    OBJECTIVES.add("pairs", Pairs)
    yield
    OBJECTIVES.remove("pairs")


def test_preferences_are_shown_as_two_answers(cli, configured, tmp_path, pairs_objective):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a?", "chosen": "yes", "rejected": "no"}\n' * 4)
    found = json.loads(cli("preview", configured, "--data", pairs, "--objective", "pairs", "--json")[1])
    assert [[piece["text"] for piece in part] for part in found["rows"][0]] == [
        ["<|begin_of_text|>a?", "yes<|eot_id|>"],
        ["<|begin_of_text|>a?", "no<|eot_id|>"],
    ]


def test_errors_name_the_line_of_the_data_and_of_the_file(cli, configured, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": "b"}\n')
    line = cli.refuses("preview", configured, "--data", bad)
    assert "bad.jsonl, line 1" in line and "--columns question=prompt,answer=completion" in line
    assert "--max-length: expected at least 2 tokens" in cli.refuses(
        "preview", configured, "--max-length", "1"
    )
    assert "no such file" in cli.refuses("preview", tmp_path / "none.yaml")


def test_a_planned_run_is_previewed_with_its_data(cli, llama, text_file, tmp_path):
    run = plan(llama, tmp_path / "run")
    assert "--data: expected the data of the training" in cli.refuses("preview", run.path)
    code, out, _ = cli("preview", run.path, "--data", text_file, "--max-length", "32", "--rows", "2")
    assert code == 0 and "row 2: 32 tokens, 32 carry the loss\n" in out
    train(run, text_file)
    found = json.loads(cli("preview", run.path, "--data", text_file, "--json")[1])
    assert found["max_length"] == 32  # as it was trained
    assert found["n_rows"] == json.loads(cli("inspect", run.path, "--json")[1])["data"]["training"]["n_rows"]
