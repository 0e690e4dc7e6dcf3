"""Rows of tokens, against those that a trainer of TRL makes."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qpa.models.base_model import load_model, load_tokenizer
from qpa.training.token_rows import tokenise_rows
from tests.ddp_worker import plan_adapter

MAX_LENGTH = 12


@pytest.fixture(scope="module")
def base(llama):
    spec, _ = plan_adapter(llama)
    return spec.base


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def prepared_by_trl(
    base: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Any
) -> list[dict[str, Any]]:
    options = {"use_cpu": True, "report_to": "none", "bf16": False, "activation_checkpointing": False}
    arguments = SFTConfig(output_dir=str(folder), max_length=MAX_LENGTH, **options)
    model = load_model(base, keep_dtype=False)
    dataset = Dataset.from_list(rows)
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "short"}, {"text": "longer than twelve tokens"}, {"text": "ä"}],
        [{"prompt": "two?", "completion": " 2."}, {"prompt": "", "completion": "no prompt"}],
        [{"prompt": "a prompt that fills the row", "completion": "lost"}, {"prompt": "a", "completion": "b"}],
        [{"input_ids": list(range(5, 25))}, {"input_ids": [7, 8]}],
    ],
    ids=["text", "prompt", "cut", "tokens"],
)
@pytest.mark.parametrize("is_ended", [False, True])
def test_the_rows_are_those_of_trl(base, tokenizer, tmp_path, rows, is_ended) -> None:
    if is_ended:
        ending = {"text", "completion"}
        rows = [{k: v + tokenizer.eos_token if k in ending else v for k, v in row.items()} for row in rows]
    found = tokenise_rows(rows, tokenizer, MAX_LENGTH)
    assert found and found == prepared_by_trl(base, tokenizer, rows, tmp_path)


class Merging:
    """A tokenizer that joins "ab" to one token, across the border of a prompt and its completion too."""

    eos_token = "."

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text.replace("ab", "C")]}


def test_a_completion_begins_where_the_tokens_part() -> None:
    (row,) = tokenise_rows([{"prompt": "xya", "completion": "bz"}], Merging(), MAX_LENGTH)
    assert row == {
        "input_ids": [ord(character) for character in "xyCz."],
        "labels": [-100, -100, ord("C"), ord("z"), ord(".")],
    }


def test_a_row_whose_prompt_fills_it_is_dropped() -> None:
    rows = [{"prompt": "x" * MAX_LENGTH, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    assert len(tokenise_rows(rows, Merging(), MAX_LENGTH)) == 1
