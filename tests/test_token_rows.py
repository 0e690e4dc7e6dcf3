"""Rows of tokens, against those that a trainer of TRL makes."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from qpa.errors import OptionError
from qpa.models.base_model import load_model, load_tokenizer
from qpa.training.data.chat_template import ChatTemplate
from qpa.training.data.examples import Answer, Text
from qpa.training.data.records import Origin
from qpa.training.data.token_rows import Tokeniser, cut, has_loss
from tests.ddp_worker import plan_adapter
from tests.tiny_models import byte_tokenizer

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
    ],
    ids=["text", "prompt", "cut"],
)
@pytest.mark.parametrize("is_ended", [False, True])
def test_the_rows_are_those_of_trl(base, tokenizer, tmp_path, rows, is_ended) -> None:
    if is_ended:
        ending = {"text", "completion"}
        rows = [{k: v + tokenizer.eos_token if k in ending else v for k, v in row.items()} for row in rows]
    found = tokenised(rows, tokenizer)
    assert found and found == prepared_by_trl(base, tokenizer, rows, tmp_path)


class Merging:
    """A tokenizer that joins "ab" to one token, across the border of a prompt and its completion too."""

    eos_token = "."
    bos_token_id = None

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text.replace("ab", "C")]}


def tokenised(rows: list[dict[str, str]], tokenizer: Any, **options: Any) -> list[dict[str, list[int]]]:
    """Return the cut rows that carry a loss."""
    tokeniser = Tokeniser(tokenizer, ChatTemplate(tokenizer, None), **options)
    here = Origin("rows.jsonl", "line", 1)
    examples = [Text(row["text"], here) if "text" in row else Answer(**row, origin=here) for row in rows]
    found = [cut(tokeniser.row(example), MAX_LENGTH) for example in examples]
    return [row for row in found if has_loss(row)]


def test_a_completion_begins_where_the_tokens_part() -> None:
    (row,) = tokenised([{"prompt": "xya", "completion": "bz"}], Merging())
    assert row == {
        "input_ids": [ord(character) for character in "xyCz."],
        "labels": [-100, -100, ord("C"), ord("z"), ord(".")],
    }


def test_a_row_whose_prompt_fills_it_has_no_loss() -> None:
    rows = [{"prompt": "x" * MAX_LENGTH, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    assert len(tokenised(rows, Merging())) == 1


def test_all_of_a_prompt_and_its_completion_may_carry_the_loss() -> None:
    (row,) = tokenised([{"prompt": "x", "completion": "y"}], Merging(), loss_on="all")
    assert row["labels"] == row["input_ids"] == [ord(character) for character in "xy."]


@pytest.mark.parametrize(
    ("row", "loss_on", "message"),
    [
        ({"text": "x"}, "completion", "expected all for texts, found completion"),
        ({"text": "x"}, "assistant", "expected all for texts, found assistant"),
        (
            {"prompt": "x", "completion": "y"},
            "assistant",
            "completion or all for prompts that are no messages",
        ),
    ],
)
def test_a_loss_on_what_is_not_there_is_refused(row: dict[str, str], loss_on: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"loss_on: .*{message}"):
        tokenised([row], Merging(), loss_on=loss_on)


def test_a_text_that_begins_with_the_first_token_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    plain, marked = tokenised([{"text": "abc"}, {"text": "<s>abc"}], tokenizer)
    assert plain == marked
    assert plain["input_ids"].count(tokenizer.bos_token_id) == 1
    plain, marked = tokenised(
        [{"prompt": "a", "completion": "b"}, {"prompt": "<s>a", "completion": "b"}], tokenizer
    )
    assert plain == marked and plain["labels"][:2] == [-100, -100]
