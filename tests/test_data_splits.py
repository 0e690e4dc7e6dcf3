import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpa.documents import SplitSummary
from qpa.errors import DataError, OptionError
from qpa.training.data.data_options import EVAL_SHARE, DataOptions
from qpa.training.data.examples import Text
from qpa.training.data.shapes import INSTRUCTION
from qpa.training.data.splits import cut_blocks, instruction_splits, read_examples
from qpa.training.evaluation import count_row_tokens, digest_of_rows
from qpa.training.objectives.sft import SFT
from qpa.training.training_options import TrainingOptions
from tests.chat_styles import STYLES
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def split(data, eval_data=None, max_length=8, seed=0):
    """Return token rows of texts, and what the records of other files say, of both splits."""
    options = DataOptions((str(data),), (str(eval_data),) if eval_data else None, max_length=max_length)
    if data.suffix in (".txt", ""):
        return instruction_splits(options, TOKENIZER, seed)[:2]
    found = read_examples(options, TOKENIZER, seed, INSTRUCTION)
    return tuple([content(example) for example in one.examples] for one in (found.training, found.evaluation))


def content(example):
    if isinstance(example, Text):
        return {"text": example.text}
    return {"prompt": example.prompt, "completion": example.completion}


def tokens_of(rows):
    return [token for row in rows for token in row["input_ids"]]


# Text


def test_a_text_becomes_blocks_that_cover_every_token(write):
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
    train, evaluation = split(write("text.txt", text))
    assert tokens_of(train) + tokens_of(evaluation) == TOKENIZER(text)["input_ids"]
    assert len(tokens_of(evaluation)) == round(EVAL_SHARE * len(text))
    assert all(len(row["input_ids"]) == 8 for row in train[:-1])
    assert 2 <= len(train[-1]["input_ids"]) <= 8


@given(st.lists(st.integers(0, 99), min_size=2, max_size=60), st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_blocks_cover_every_token_that_is_ever_predicted(tokens, max_length):
    blocks = cut_blocks(tokens, max_length)
    covered = [token for block in blocks for token in block]
    # A last token alone in its block has nothing before it to be predicted from.
    n_alone = 1 if len(tokens) % max_length == 1 else 0
    assert covered == tokens[: len(tokens) - n_alone]
    assert all(2 <= len(block) <= max_length for block in blocks)


@given(st.text(alphabet="abc \né漢", min_size=4, max_size=80).filter(str.strip), st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_the_eval_split_of_a_text_is_its_end(tmp_path_factory, text, max_length):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, newline="")
    tokens = TOKENIZER(text)["input_ids"]
    train, evaluation = split(path, max_length=max_length)
    n_eval = max(2, round(EVAL_SHARE * len(tokens)))
    assert tokens_of(evaluation) == tokens[-n_eval:][: len(tokens_of(evaluation))]
    assert tokens_of(train) == tokens[:-n_eval][: len(tokens_of(train))]
    assert n_eval - len(tokens_of(evaluation)) <= 1
    assert len(tokens) - n_eval - len(tokens_of(train)) <= 1


def test_the_seed_does_not_change_the_split_of_a_text(write):
    path = write("text.txt", "words " * 50)
    assert split(path, seed=0) == split(path, seed=1)


def test_a_given_eval_file_is_used_whole(write):
    data, evaluation = write("train.txt", "a" * 30), write("eval.txt", "b" * 20)
    rows = split(data, evaluation)
    assert tokens_of(rows[0]) == TOKENIZER("a" * 30)["input_ids"]
    assert tokens_of(rows[1]) == TOKENIZER("b" * 20)["input_ids"]


# jsonl


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson", "ROWS.JSONL", "Rows.Json"])
def test_rows_are_split_into_disjoint_parts_in_their_order(write, name):
    rows = [{"text": f"row {index}"} for index in range(40)]
    train, evaluation = split(write(name, jsonl(rows)), seed=5)
    assert len(evaluation) == 4
    assert sorted([*train, *evaluation], key=rows.index) == rows
    assert train == [row for row in rows if row not in evaluation]


def test_the_split_of_rows_depends_on_the_seed_only(write):
    path = write("rows.jsonl", jsonl([{"text": f"row {index}"} for index in range(40)]))
    assert split(path, seed=5) == split(path, seed=5)
    assert len({split(path, seed=seed)[1][0]["text"] for seed in range(8)}) > 1


def test_two_rows_are_one_to_train_and_one_to_evaluate(write):
    train, evaluation = split(write("rows.jsonl", jsonl([{"text": "a"}, {"text": "b"}])))
    assert sorted(row["text"] for row in train + evaluation) == ["a", "b"]
    assert len(train) == 1


def test_blank_lines_other_keys_and_windows_line_ends_are_ignored(write):
    text = '\n{"text": "a", "id": 1}\r\n\n  \n{"id": [2], "text": "b\\u2028c"}\n\n'
    train, evaluation = split(write("rows.jsonl", text))
    assert sorted(row["text"] for row in train + evaluation) == ["a", "b\u2028c"]
    assert all(set(row) == {"text"} for row in train + evaluation)


def test_a_line_separator_within_a_string_is_no_new_line(write):
    text = '{"text": "a\u2028b\x85c"}\n{"text": "d"}\n'
    train, evaluation = split(write("rows.jsonl", text))
    assert sorted(row["text"] for row in train + evaluation) == ["a\u2028b\x85c", "d"]


def test_prompt_and_completion_are_kept(write):
    rows = [{"prompt": "", "completion": "all"}, {"prompt": "one", "completion": "two"}]
    train, evaluation = split(write("rows.jsonl", jsonl(rows)))
    assert sorted(train + evaluation, key=rows.index) == rows


# What is refused


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl"])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: expected a data file, found no such file"):
        split(tmp_path / name)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a directory with text files or a dataset, found no files"):
        split(tmp_path)


@pytest.mark.parametrize("content", ["", "\n\n", " \t\r\n"])
@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_an_empty_file_is_refused(write, name, content):
    with pytest.raises(DataError, match=rf"{name}: expected text, found an empty file"):
        split(write(name, content))


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_a_binary_file_is_refused_with_the_offset(write, name):
    with pytest.raises(DataError, match=r"found binary data \(byte 0 at offset 7\)"):
        split(write(name, b"\x89PNG ok\x00\x00\x01"))


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_a_file_in_another_encoding_is_refused_with_the_offset(write, name):
    with pytest.raises(DataError, match=r"expected UTF-8 text, found byte 0xe9 at offset 3; convert it"):
        split(write(name, "café au lait".encode("latin-1")))


@pytest.mark.parametrize("text", ["a", "ab", "abc"])
def test_a_text_too_short_to_split_is_refused(write, text):
    with pytest.raises(DataError, match=f"found {len(text)}: too short"):
        split(write("text.txt", text))


def test_an_eval_text_too_short_is_refused_by_its_name(write):
    with pytest.raises(DataError, match=r"eval\.txt: expected at least 2 tokens, found 1: too short"):
        split(write("train.txt", "long enough"), write("eval.txt", "a"))


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_max_length_below_two_is_refused(write, max_length):
    with pytest.raises(OptionError, match=f"max_length: expected at least 2 tokens, found {max_length}"):
        split(write("text.txt", "long enough"), max_length=max_length)


def test_one_row_is_too_few_to_split(write):
    with pytest.raises(DataError, match=r"rows\.jsonl: expected at least 2 rows, .* found 1"):
        split(write("rows.jsonl", '{"text": "alone"}\n'))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"broken JSON \(Unterminated string"),
        ("{'text': 'python'}", "broken JSON"),
        ("no json", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ('["text"]', "found list"),
        ('"text"', "found str"),
        ("null", "found NoneType"),
        ("{}", "found an empty object"),
        ('{"content": "a", "id": 1}', 'found keys "content", "id"'),
        ('{"prompt": "a"}', 'found keys "prompt"'),
        ('{"text": 3}', 'expected "text" with a text, found int'),
        ('{"text": null}', 'expected "text" with a text, found NoneType'),
        ('{"text": ["a"]}', 'expected "text" with a text, found list'),
        ('{"prompt": "a", "completion": "b"}', 'found keys "completion", "prompt"'),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_line_is_refused_with_its_number(write, line, message):
    path = write("rows.jsonl", f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(DataError, match=message) as caught:
        split(path)
    assert caught.value.subject == f"{path}, line 3"
    assert "\n" not in str(caught.value)


def test_mixed_keys_are_refused_with_both_sets(write):
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    with pytest.raises(
        DataError,
        match=r'line 2: expected rows with "prompt" and "completion", as those before, found keys "text"',
    ):
        split(write("rows.jsonl", jsonl(rows)))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("eval.txt", "rows of shape prompt-completion, as in"),
        ("eval.jsonl", 'rows with "prompt" and "completion"'),
    ],
)
def test_an_eval_file_of_other_rows_is_refused(write, other, expected):
    data = write("train.jsonl", jsonl([{"prompt": "a", "completion": "b"}]))
    with pytest.raises(DataError, match=rf"eval\..*: expected {expected}"):
        split(data, write(other, jsonl([{"text": "c"}])))


def test_rows_to_evaluate_a_text_are_refused(write):
    with pytest.raises(DataError, match=r"train\.txt: expected rows, as in .*eval\.jsonl, found text"):
        options = DataOptions(
            (str(write("train.txt", "words")),), (str(write("eval.jsonl", '{"text": "a"}')),)
        )
        instruction_splits(options, TOKENIZER, 0)


@pytest.mark.parametrize("empty", [{"text": " "}, {"prompt": "a", "completion": ""}])
def test_empty_rows_are_left_out_and_counted(write, empty):
    rows = [{name: f"row {index}" for name in empty} for index in range(9)]
    options = DataOptions((str(write("rows.jsonl", jsonl([*rows[:4], empty, *rows[4:]]))),))
    without = DataOptions((str(write("others.jsonl", jsonl(rows))),))
    found = instruction_splits(options, TOKENIZER, 3)
    assert found[:2] == instruction_splits(without, TOKENIZER, 3)[:2]
    assert (found.summary.training.n_empty_rows, found.summary.evaluation.n_empty_rows) == (1, 0)
    with pytest.raises(DataError, match="expected rows with something to learn, found 2 empty ones"):
        instruction_splits(DataOptions((str(write("none.jsonl", jsonl([empty, empty]))),)), TOKENIZER, 0)


def test_a_jsonl_file_of_unicode_blanks_is_refused(write):
    blank = write("rows.jsonl", "\u00a0\n\u2003\n")
    rows = write("train.jsonl", jsonl([{"text": "a"}]))
    for data, evaluation in ((blank, None), (blank, rows), (rows, blank)):
        with pytest.raises(DataError, match=r"rows\.jsonl: "):
            split(data, evaluation)


def test_half_a_surrogate_pair_is_refused_with_its_line(write):
    path = write("rows.jsonl", '{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(DataError, match="line 2") as caught:
        split(path)
    assert caught.value.found == r'half of a surrogate pair in "text" (\ud83d)'
    assert "codec" not in str(caught.value)


def test_half_a_surrogate_pair_counts_only_where_it_is_read(write):
    text = '{"text": "a", "id": "\\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n'
    rows = split(write("rows.jsonl", text))
    assert sorted(row["text"] for row in rows[0] + rows[1]) == ["a", "whole \U0001f600"]


# A byte order mark


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.json", "array.json"])
def test_a_byte_order_mark_is_no_content(write, name):
    rows = [{"text": f"row {index}"} for index in range(12)]
    content = json.dumps(rows) if name == "array.json" else jsonl(rows)
    plain = split(write(name, content))
    assert split(write(name, b"\xef\xbb\xbf" + content.encode())) == plain


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.json"])
def test_a_file_of_nothing_but_a_byte_order_mark_is_empty(write, name):
    with pytest.raises(DataError, match=rf"{name}: expected text, found an empty file"):
        split(write(name, b"\xef\xbb\xbf\r\n"))


def test_offsets_count_the_byte_order_mark(write):
    with pytest.raises(DataError, match="found byte 0xe9 at offset 6"):
        split(write("data.txt", b"\xef\xbb\xbfcaf\xe9 au lait"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_utf_16_is_called_by_its_name(write, name, encoding):
    with pytest.raises(DataError, match="expected UTF-8 text, found UTF-16 text; convert it to UTF-8"):
        split(write(name, "\ufeffas Notepad writes it".encode(encoding)))


# A JSON array


@pytest.mark.parametrize("name", ["data.json", "DATA.JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_has_the_rows_of_the_same_lines(write, name, indent):
    rows = [{"prompt": f"row {index}\u2028", "completion": "yes", "id": index} for index in range(40)]
    array = write(name, "\n " + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n")
    assert split(array, seed=3) == split(write("data.jsonl", jsonl(rows)), seed=3)


def test_an_array_is_read_as_evaluation_data_too(write):
    train = write("train.jsonl", jsonl([{"text": "a"}, {"text": "b"}]))
    assert split(train, write("eval.json", '[{"text": "c"}]'))[1] == [{"text": "c"}]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("3", "int"),
        ("[]", "list"),
        ('{"id": 1}', 'keys "id"'),
        ('{"text": "\\udc00"}', r'half of a surrogate pair in "text" (\udc00)'),
        ('{"prompt": "a", "completion": "b"}', 'keys "completion", "prompt"'),
    ],
)
def test_a_bad_entry_is_refused_with_its_number(write, entry, found):
    path = write("data.json", f'[{{"text": "a"}},\n\n {{"text": "b"}}, {entry}, {{"text": "c"}}]')
    with pytest.raises(DataError) as caught:
        split(path)
    assert (caught.value.subject, caught.value.found) == (f"{path}, entry 3", found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected rows, found none"),
        ('[{"text": "a"}, {"text": ]', r"expected a JSON array of objects, found broken JSON \(.*column 26"),
        ('[{"text": "a"}', "expected a JSON array of objects, found broken JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "expected a JSON array of objects, found broken JSON"),
        ('[{"text": "a"}]', "expected at least 2 rows"),
        ("[" * 100_000, "expected a JSON array of objects, found broken JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_a_broken_or_short_array_is_refused(write, content, message):
    with pytest.raises(DataError, match=rf"data\.json: {message}") as caught:
        split(write("data.json", content))
    assert "\n" not in str(caught.value)


def test_an_array_is_read_from_a_json_file_only(write):
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: expected an object, found list"):
        split(write("rows.jsonl", '[{"text": "a"}, {"text": "b"}]'))


# What runs trained on before

ANSWERS = json.dumps([{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "id": n} for n in range(30)])


@pytest.mark.parametrize(
    ("name", "content", "evaluation", "digest"),
    [
        (
            "text.txt",
            "".join(f"line {n}: {n % 7}\n" for n in range(50)),
            None,
            "a20adf7fbfc529a4e63d0195aa737e0a2d6e1f98837ab34d5eab42d27b7acbe9",
        ),
        (
            "texts.jsonl",
            jsonl([{"text": f"row {n} é"} for n in range(30)]),
            None,
            "22a1cdc6af852f3c66bc5a88bc9e0f9abe294f5cbeacf4fca137988c50f3011f",
        ),
        ("answers.json", ANSWERS, None, "6bb1582a720db6d2e33194e4c3d0037dde73361a3eb0e3406f7bd82c095beb1b"),
        (
            "answers.json",
            ANSWERS,
            ANSWERS[:200].rsplit(", {", 1)[0] + "]",
            "9817200e5a7186b255d0dbfdfd312610673f57bb1f0bb889bf49c6a62726f1c2",
        ),
    ],
    ids=["text", "texts", "answers", "evaluation"],
)
def test_the_rows_of_older_runs_are_the_same(write, name, content, evaluation, digest):
    """The digests are those of the first version, with the same seed and `max_length`."""
    eval_data = (str(write("eval.json", evaluation)),) if evaluation else None
    options = DataOptions((str(write(name, content)),), eval_data, max_length=12)
    splits = instruction_splits(options, TOKENIZER, 5)
    assert digest_of_rows(splits.training, splits.evaluation) == f"sha256:{digest}"


# What is counted


def test_what_is_cut_and_lost_is_counted(write):
    rows = [
        *({"prompt": "a", "completion": "b"} for _ in range(6)),
        {"prompt": "a", "completion": "b" * 20},
        {"prompt": "a" * 20, "completion": "b"},
    ]
    options = DataOptions(
        (str(write("rows.jsonl", jsonl(rows))),), (str(write("eval.jsonl", jsonl(rows[:1]))),), max_length=8
    )
    found = instruction_splits(options, TOKENIZER, 0)
    assert found.summary.shape == "prompt-completion" and found.summary.chat_template is None
    assert found.summary.training == SplitSummary(
        n_rows=7,
        n_unpacked=7,
        n_tokens=6 * 3 + 8,
        n_loss_tokens=6 * 2 + 7,
        n_cut_rows=2,
        n_cut_tokens=(22 - 8) + (22 - 8),
        n_lost_rows=1,
        n_silent_rows=0,
        n_empty_rows=0,
    )
    assert found.summary.training.n_loss_tokens == count_row_tokens(found.training)
    assert found.summary.evaluation.n_tokens == 3


def test_messages_without_an_answer_are_left_out_and_counted(write):
    tokenizer = STYLES["llama-3"].tokenizer()
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [asked, said]}] * 5 + [
        {"messages": [{"role": "system", "content": "c"}]},
        {"messages": [asked]},
    ]
    data = str(write("rows.jsonl", jsonl(rows)))
    found = instruction_splits(DataOptions((data,), (data,)), tokenizer, 0)
    assert len(found.training) == 5 and found.summary.training.n_silent_rows == 2
    assert found.summary.chat_template.startswith("sha256:")
    asks = str(write("asks.jsonl", jsonl(rows[5:])))
    with pytest.raises(
        DataError, match="the evaluation split: expected an answer that carries the loss, found none"
    ):
        instruction_splits(DataOptions((data,), (asks,)), tokenizer, 0)
    everything = instruction_splits(DataOptions((data,), (data,), loss_on="all"), tokenizer, 0)
    assert len(everything.training) == 7


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_share_that_is_held_out_may_be_chosen(write, share):
    rows = str(write("rows.jsonl", jsonl([{"text": f"row {index}"} for index in range(40)])))
    assert (
        len(instruction_splits(DataOptions((rows,), eval_share=share), TOKENIZER, 0).evaluation) == 40 * share
    )
    text = str(write("text.txt", "words " * 50))
    found = instruction_splits(DataOptions((text,), eval_share=share), TOKENIZER, 0)
    assert len(tokens_of(found.evaluation)) == 300 * share


def test_texts_follow_each_other_with_an_end_of_text_between_them(write):
    names = tuple(str(write(name, name * 5)) for name in ("a.txt", "b.txt"))
    found = instruction_splits(DataOptions(names, max_length=8), TOKENIZER, 0)
    expected = TOKENIZER("a.txt" * 5 + TOKENIZER.eos_token + "b.txt" * 5)["input_ids"]
    assert tokens_of(found.training) + tokens_of(found.evaluation) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": "completion"}, "loss_on: expected all for text files, found completion"),
        ({"columns": ("a=text",)}, "columns: expected no such option for text files"),
        ({"chat_template": "trl"}, "chat_template: expected no such option for text files"),
    ],
)
def test_options_of_records_are_refused_for_a_text(write, options, message):
    with pytest.raises(OptionError, match=message):
        instruction_splits(DataOptions((str(write("text.txt", "words " * 9)),), **options), TOKENIZER, 0)


def test_rows_of_which_all_is_cut_are_refused(write):
    data = str(write("rows.jsonl", jsonl([{"prompt": "a" * 9, "completion": "b"}] * 4)))
    with pytest.raises(
        DataError, match="the training split: expected a completion within `max_length`, found none"
    ):
        instruction_splits(DataOptions((data,), max_length=8), TOKENIZER, 0)


def test_a_tokenizer_that_pads_with_its_end_of_text_keeps_the_loss_of_the_end(write):
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    data = str(
        write("rows.jsonl", jsonl([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcd"}]))
    )
    options = TrainingOptions((data,), (data,))
    objective = SFT(options, TOKENIZER)
    batch = objective.collate(objective.rows(0).training)
    ends = (batch["labels"] == TOKENIZER.eos_token_id).sum(dim=1)
    assert ends.tolist() == [1, 1] and int(batch["attention_mask"][0].sum()) == 3


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_text():
    tokenizer = STYLES["llama-3"].tokenizer()
    assert tokenizer.pad_token is None
    SFT(TrainingOptions(("x",)), tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
