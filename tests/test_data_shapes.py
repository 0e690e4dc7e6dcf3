"""What columns mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qpa.errors import DataError, OptionError
from qpa.training.data.data_options import DataOptions
from qpa.training.data.examples import Answer, Conversation, Preference, Text
from qpa.training.data.records import Origin, Record
from qpa.training.data.shapes import INSTRUCTION, PREFERENCE, SHAPES, ShapeReader
from qpa.training.data.splits import preference_splits
from tests.tiny_models import byte_tokenizer

HERE = Origin("rows.jsonl", "line", 7)
ASKED = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(content, *columns, wanted=INSTRUCTION, has_template=False):
    return ShapeReader(wanted, columns, has_template=has_template).read(Record(content, HERE))


def messages(*, n_prompt=None, tools=None, arguments=None, of):
    return Conversation(list(of), HERE, n_prompt, tools, arguments or {})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"text": "a", "messages": [ASKED]}, Text("a", HERE)),
        ({"prompt": "a", "completion": "b", "text": "c"}, Answer("a", "b", HERE)),
        ({"prompt": [ASKED], "completion": [SAID]}, messages(of=[ASKED, SAID], n_prompt=1)),
        ({"messages": [ASKED, SAID]}, messages(of=[ASKED, SAID])),
        ({"messages": '[{"role": "user", "content": "Why?"}]'}, messages(of=[ASKED])),
        (
            {"messages": [ASKED], "tools": [{"a": 1}], "chat_template_kwargs": {"b": 2}},
            messages(of=[ASKED], tools=[{"a": 1}], arguments={"b": 2}),
        ),
        ({"messages": [ASKED], "tools": '[{"a": 1}]'}, messages(of=[ASKED], tools=[{"a": 1}])),
        ({"messages": [ASKED], "tools": None, "chat_template_kwargs": None}, messages(of=[ASKED])),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
            messages(of=[ASKED, SAID]),
        ),
        ({"conversations": [ASKED, SAID]}, messages(of=[ASKED, SAID])),
        ({"user": "Why?", "assistant": "Because."}, messages(of=[ASKED, SAID], n_prompt=1)),
        (
            {"user": "Why?", "assistant": "Because.", "system": "Be brief."},
            messages(of=[SYSTEM, ASKED, SAID], n_prompt=2),
        ),
        ({"text": " \n"}, None),
        ({"prompt": "a", "completion": ""}, None),
        ({"instruction": "a", "output": " "}, None),
        ({"user": "a", "assistant": ""}, None),
    ],
    ids=str,
)
def test_columns_have_a_meaning(content, expected):
    assert read(content) == expected


def test_alpaca_is_a_turn_of_messages_where_there_is_a_chat_template():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    found = read(row, has_template=True)
    asked = {"role": "user", "content": "Add.\n\n1, 2"}
    assert found == messages(of=[asked, {"role": "assistant", "content": "3"}], n_prompt=1)
    assert read({**row, "input": ""}, has_template=True).messages[0]["content"] == "Add."


def test_alpaca_has_headings_where_there_is_none():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert read(row) == Answer("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "3", HERE)
    assert read({**row, "input": None}).prompt == "### Instruction:\nAdd.\n\n### Response:\n"
    assert read({**row, "system": "Short."}).prompt.startswith("Short.\n\n### Instruction:")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("question=prompt", "answer=completion"), Answer("Why?", "Because.", HERE)),
        (("question=user", "answer=assistant"), messages(of=[ASKED, SAID], n_prompt=1)),
        (("answer=text",), Text("Because.", HERE)),
        ((" question = prompt ", "answer =completion"), Answer("Why?", "Because.", HERE)),
        (("a=b=prompt", "answer=completion"), Answer("odd", "Because.", HERE)),
    ],
)
def test_columns_of_other_names_are_given_ours_and_then_they_alone_count(columns, expected):
    assert read({"question": "Why?", "answer": "Because.", "text": "no", "a=b": "odd"}, *columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("question",), "columns: expected pairs such as question=prompt,answer=completion, found question"),
        (("=prompt",), "expected pairs"),
        (("question=ask",), r"columns: expected one of .*, completion, .* behind =, found ask"),
        (("a=prompt", "b=prompt"), "expected each name once, found b=prompt"),
        (("a=prompt", "a=completion"), "expected each name once, found a=completion"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns, message):
    with pytest.raises(OptionError, match=message):
        read({"a": "b"}, *columns)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ({"question": "a", "answer": "b"}, "say which is which: `columns` question=prompt,answer=completion"),
        ({"input": "a", "output": "b"}, "`columns` input=prompt,output=completion"),
        ({"a": 1, "b": 2}, "say which is which with `columns`, such as question=prompt"),
        ({"chosen": "a", "rejected": "b"}, '"chosen" and "rejected" are for another `objective`'),
    ],
)
def test_an_unknown_shape_is_refused_with_its_columns_and_advice(content, advice):
    with pytest.raises(DataError) as caught:
        read(content)
    assert caught.value.subject == "rows.jsonl, line 7"
    assert '"prompt" and "completion"; "text"; "messages"' in caught.value.expected
    assert all(f'"{name}"' in caught.value.found for name in content)
    assert advice in caught.value.advice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt": "a", "completion": 4}, '"completion" with a text, found int'),
        ({"prompt": {}, "completion": "b"}, '"prompt" with a text or messages, found dict'),
        ({"prompt": [ASKED], "completion": "b"}, '"completion" with a list, or its JSON, found broken JSON'),
        ({"messages": []}, '"messages" with a list of messages, found an empty list'),
        ({"messages": {"role": "user"}}, '"messages" with a list of messages, found dict'),
        ({"messages": "[1"}, '"messages" with a list, or its JSON, found broken JSON'),
        ({"messages": [ASKED, "b"]}, '"messages", message 2 with "role" and "content", found str'),
        ({"messages": [{"role": "bot", "content": "a"}]}, 'message 1: "role" to be .*assistant.*, found bot'),
        ({"messages": [{"content": "a"}]}, '"role" to be .*, found None'),
        ({"messages": [{"role": "user"}]}, '"content" with a text, found NoneType'),
        ({"messages": [{**SAID, "weight": 0}]}, 'without a weight of its own, found "weight"; .* `loss_on`'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            'message 1: "content" with a text, found image',
        ),
        ({"messages": [{"role": "user", "content": "half \ud83d"}]}, 'surrogate pair in "messages"'),
        ({"conversations": [{"from": "alien", "value": "a"}]}, '"from" to be .*human.*, found alien'),
        ({"messages": [ASKED], "tools": ["name"]}, '"tools" with a list of JSON schemas, found list'),
        (
            {"messages": [ASKED], "chat_template_kwargs": "x"},
            '"chat_template_kwargs" with an object, found str',
        ),
        ({"instruction": "a \udc00", "output": "b"}, 'surrogate pair in "instruction"'),
    ],
    ids=str,
)
def test_a_broken_value_is_refused_with_its_line(content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(content)
    assert caught.value.subject == "rows.jsonl, line 7"
    assert "\n" not in str(caught.value)


def test_a_content_of_pieces_is_one_text_and_keys_without_a_value_are_left_out():
    pieces = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    row = {"messages": [{"role": "user", "content": pieces, "tool_calls": None, "name": "Ann"}]}
    assert read(row).messages == [{**ASKED, "name": "Ann"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert read({"messages": [ASKED, call]}).messages[1] == {**call, "content": ""}


def test_a_column_that_columns_names_must_be_there():
    with pytest.raises(DataError, match='expected "query", which `columns` names, found keys "question"'):
        read({"question": "a"}, "query=text")


def test_all_records_have_the_shape_of_the_first():
    reader = ShapeReader(INSTRUCTION, None, has_template=False)
    reader.read(Record({"messages": [ASKED]}, HERE))
    with pytest.raises(DataError, match='expected rows with "messages", as those before, found keys "text"'):
        reader.read(Record({"text": "a"}, HERE))


# Preferences


SAD = {"role": "assistant", "content": "No idea."}


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAD]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, SAD]},
        {"prompt": "Why?", "chosen": [ASKED, SAID], "rejected": [ASKED, SAD]},
    ],
)
def test_a_preference_between_messages(content):
    both = [messages(of=[ASKED, last], n_prompt=1) for last in (SAID, SAD)]
    assert read(content, wanted=PREFERENCE) == Preference(*both, HERE)


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "Why?", "chosen": " Because.", "rejected": " No idea."},
        {"chosen": "Why? Because.", "rejected": "Why? No idea."},
    ],
)
def test_a_preference_between_texts(content):
    expected = Preference(Answer("Why?", " Because.", HERE), Answer("Why?", " No idea.", HERE), HERE)
    assert read(content, wanted=PREFERENCE) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"prompt": "Why?", "chosen": [SAID], "rejected": [SAD]},
            '"chosen" and "rejected" that begin with one',
        ),
        ({"prompt": "Why?", "chosen": "a", "rejected": 3}, '"rejected" with a text, found int'),
        ({"chosen": "a"}, 'one of: "chosen" and "rejected", found keys "chosen"'),
        ({"text": "a"}, '"text" are for another `objective`'),
    ],
)
def test_what_is_no_preference_is_refused(content, message):
    with pytest.raises(DataError, match=message):
        read(content, wanted=PREFERENCE)


def test_preferences_become_the_columns_of_a_dpo_trainer(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [f'{{"prompt": "{n}?", "chosen": "yes", "rejected": "never {n}"}}' for n in range(8)]
    lines += ['{"prompt": "same", "chosen": "a", "rejected": "a"}']
    lines += [f'{{"prompt": "{"long" * 20}", "chosen": "yes", "rejected": "no"}}'] * 2
    file.write_text("\n".join(lines))
    tokenizer = byte_tokenizer()
    found = preference_splits(DataOptions((str(file),), max_length=9), tokenizer, 0)
    rows = [*found.training, *found.evaluation]
    assert len(rows) == 8
    assert {tokenizer.decode(row["chosen_ids"]) for row in rows} == {"yes<|endoftext|>"}
    row = next(row for row in rows if tokenizer.decode(row["prompt_ids"]) == "3?")
    assert tokenizer.decode(row["rejected_ids"]) == "never 3<|endoftext|>"
    assert row["input_ids"] == row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]
    assert row["labels"] == [-100] * 2 + row["chosen_ids"] + row["rejected_ids"]
    both = (found.summary.training, found.summary.evaluation)
    assert sum(split.n_lost_rows for split in both) == 2 and both[0].n_empty_rows == 1
    for options in ({"packing": True}, {"loss_on": "all"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            preference_splits(DataOptions((str(file),), **options), tokenizer, 0)


# The page


def test_the_rows_on_the_page_have_the_shapes_it_says():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    rows = [json.loads(row) for row in re.findall(r"^\| [^|]+ \| `(\{.*\})` \|$", page, flags=re.M)]
    found = [read(row, wanted=(*INSTRUCTION, *PREFERENCE), has_template=True) for row in rows]
    kinds = [type(example).__name__ for example in found]
    assert kinds == ["Answer", "Conversation", "Text", *["Conversation"] * 4, "Preference"]
    assert len(rows) == len(SHAPES) + 1  # prompts with completions are there as texts and as messages
