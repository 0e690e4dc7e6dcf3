"""Records of files, directories and datasets, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, config, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qpa.errors import DataError
from qpa.training.data.sources.csv_file import read_csv
from qpa.training.data.sources.dataset import DatasetName, is_hub_name
from qpa.training.data.sources.source import read_sources

ROWS = [{"text": "one"}, {"text": "two\nlines"}, {"text": 'quote " and, comma'}]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file, with the directories above it, and returns its name."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Let datasets keep what it makes below the test's own directory."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(*names, revision=None):
    """Return the contents of records and their places below the test's directory."""
    found = read_sources(names, revision).records
    return [(record.content, str(record.origin).rpartition("/")[2]) for record in found]


# CSV


def test_a_csv_file_has_rows_with_the_lines_where_they_begin(write):
    name = write("rows.csv", 'text,id\none,1\n"two\nlines",2\n\n"quote "" and, comma",3\n')
    assert read(name) == [
        ({"text": "one", "id": "1"}, "rows.csv, line 2"),
        ({"text": "two\nlines", "id": "2"}, "rows.csv, line 3"),
        ({"text": 'quote " and, comma', "id": "3"}, "rows.csv, line 6"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "\ufeffquestion,answer\r\na,b\r\n"),
        ("ROWS.CSV", '"question";"answer"\n"a";"b"\n'),
        ("rows.tsv", "question\tanswer\na\tb\n"),
    ],
)
def test_a_byte_order_mark_windows_line_ends_and_other_separators_are_understood(write, name, content):
    assert [content for content, _ in read(write(name, content))] == [{"question": "a", "answer": "b"}]


def test_a_csv_file_of_long_values_is_read_and_python_s_limit_stays(write):
    limit = csv.field_size_limit()
    (record,) = read_csv_of(write, "text\n" + "x" * 200_000 + "\n")
    assert len(record.content["text"]) == 200_000
    assert csv.field_size_limit() == limit


def read_csv_of(write, content):
    return list(read_csv(Path(write("rows.csv", content))))


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(str.strip)))
@settings(max_examples=40, deadline=None)
def test_what_python_writes_is_read_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["text", "id"], *([text, str(index)] for index, text in enumerate(texts))])
    path.write_text(table.getvalue(), newline="")
    assert [record.content["text"] for record in read_csv(path)] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,id\na,1\nb\n", r"rows\.csv, line 3: expected 2 values, as in the first line, found 1"),
        ("text,id\na,1,2\n", r"rows\.csv, line 2: expected 2 values, as in the first line, found 3"),
        (
            'text\nfine\n"never closed\n',
            r"rows\.csv, line 3: expected a row of a CSV file, found unexpected end",
        ),
        (
            "text,text\na,b\n",
            r'rows\.csv, line 1: expected a different name for each column, found "text" twice',
        ),
        ("text,\na,b\n", r"rows\.csv, line 1: .* found a column without a name"),
        ("text,id\n", r"rows\.csv: expected rows, found none"),
        ("", r"rows\.csv: expected text, found an empty file"),
    ],
)
def test_a_broken_csv_file_is_refused_with_the_line(write, content, message):
    with pytest.raises(DataError, match=message):
        read(write("rows.csv", content))


# Parquet, and datasets


def test_a_parquet_file_has_rows_with_numbers(write, tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=2)
    assert read(str(tmp_path / "rows.parquet")) == [
        (content, f"rows.parquet, row {number}") for number, content in enumerate(ROWS, start=1)
    ]
    for name, content, found in (("bad", b"PAR1 and more", "a Parquet file"), ("none", None, "no such file")):
        path = tmp_path / f"{name}.parquet"
        if content:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.parquet: .*{found}"):
            read(str(path))


def test_a_saved_dataset_is_read_by_its_split(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS[:1]), test=Dataset.from_list(ROWS[1:])).save_to_disk(
        tmp_path / "two"
    )
    assert [content for content, _ in read(str(tmp_path / "one"))] == ROWS
    assert read(str(tmp_path / "two")) == [(ROWS[0], "two (train), row 1")]
    assert [place for _, place in read(f"{tmp_path}/two::test")] == ["two (test), row 1", "two (test), row 2"]
    with pytest.raises(DataError, match=r'two: expected a dataset with a split "dev", found .*dev'):
        read(f"{tmp_path}/two::dev")


def test_a_copy_of_a_dataset_of_the_hub_is_read_by_configuration_and_split(write, tmp_path):
    card = """---
configs:
- config_name: easy
  data_files: [{split: train, path: easy/train.jsonl}, {split: test, path: easy/test.jsonl}]
- config_name: hard
  data_files: [{split: train, path: hard.jsonl}]
---
"""
    write("copy/README.md", card)
    for name, text in (("easy/train", "a"), ("easy/test", "b"), ("hard", "c")):
        write(f"copy/{name}.jsonl", json.dumps({"text": text}))
    found = [read(f"{tmp_path}/copy:{rest}")[0][0] for rest in ("easy", "easy:test", "hard")]
    assert found == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    with pytest.raises(DataError, match="name the configuration and split as NAME:CONFIGURATION:SPLIT"):
        read(f"{tmp_path}/copy")
    with pytest.raises(DataError, match="expected NAME:CONFIGURATION:SPLIT, found more parts"):
        read(f"{tmp_path}/copy:a:b:c")


COMMIT = "0123456789" * 4


@pytest.fixture
def kept(tmp_path):
    """Keep a dataset of the Hub as datasets keeps one that was fetched once."""
    folder = tmp_path / "cache" / "somebody___talks" / "default" / "0.0.0" / COMMIT
    write = parquet.write_table
    (tmp_path / "source").mkdir()
    write(pyarrow.Table.from_pylist(ROWS), tmp_path / "source" / "train.parquet")
    made = load_dataset(str(tmp_path / "source"), split="train", cache_dir=str(tmp_path / "made"))
    folder.mkdir(parents=True)
    (source,) = made.cache_files
    shutil.copy(source["filename"], folder / "talks-train.arrow")
    info = made.info
    info.download_checksums = {f"hf://datasets/somebody/talks@{COMMIT}/train.parquet": {"num_bytes": 1}}
    info.dataset_name = "talks"
    info.write_to_directory(str(folder))
    return folder


def test_a_dataset_of_the_hub_is_read_with_the_revision_that_it_is(kept):
    found = read_sources(["somebody/talks"], None)
    assert [record.content for record in found.records] == ROWS
    assert str(found.records[2].origin) == "somebody/talks (train), row 3"
    assert [(one.name, one.revision) for one in found.hub] == [("somebody/talks", COMMIT)]
    assert read_sources(["somebody/talks::train"], COMMIT).hub[0].revision == COMMIT
    with pytest.raises(DataError, match=f"expected revision {'f' * 40}, found {COMMIT}; go online"):
        read_sources(["somebody/talks"], "f" * 40)


def test_a_dataset_that_cannot_be_reached_is_refused_in_one_line():
    with pytest.raises(
        DataError, match=r'^nobody/nothing: expected a dataset with a split "train", found '
    ) as caught:
        read("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *((text, True) for text in ("openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k:main:test", "a/b::c")),
        *((text, False) for text in ("gsm8k", "./a/b", "../b", "/a/b", "a/b/c", "~/b", "a/", "text.txt")),
    ],
)
def test_names_of_the_hub_have_an_owner(text, is_one):
    assert is_hub_name(text) == is_one


def test_a_name_has_a_configuration_and_a_split():
    assert DatasetName.parse("a/b") == ("a/b", None, "train")
    assert DatasetName.parse("a/b:main") == ("a/b", "main", "train")
    assert DatasetName.parse("a/b::test") == ("a/b", None, "test")


# Directories, and several names


def test_a_directory_of_texts_is_read_in_the_order_of_its_paths(write, tmp_path):
    for name in ("b.txt", "a/z.md", "a/c.txt", ".git/config", "a/.hidden"):
        write(f"texts/{name}", name)
    found = read_sources([str(tmp_path / "texts")], None)
    assert [text for _, text in found.texts] == ["a/c.txt", "a/z.md", "b.txt"]
    write("texts/picture.png", b"\x89PNG\0")
    with pytest.raises(DataError, match=r"picture\.png: expected text, found binary data"):
        read(str(tmp_path / "texts"))


def test_several_names_follow_each_other(write):
    names = write("a.jsonl", '{"text": "a"}'), write("b.csv", "text\nb\n"), write("c.json", '[{"text": "c"}]')
    assert read(*names) == [
        ({"text": "a"}, "a.jsonl, line 1"),
        ({"text": "b"}, "b.csv, line 2"),
        ({"text": "c"}, "c.json, entry 1"),
    ]
    texts = read_sources([write("one.txt", "one"), write("two.md", "two")], None).texts
    assert [text for _, text in texts] == ["one", "two"]


def test_texts_beside_records_are_refused(write):
    with pytest.raises(DataError, match=r"a\.jsonl, .*b\.txt: expected texts or records, found both"):
        read(write("a.jsonl", '{"text": "a"}'), write("b.txt", "b"))


@pytest.mark.parametrize("name", ["absent.txt", "data/absent.jsonl", "./a/b", "a/b.csv"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="expected a data file, found no such file"):
        read(name)
