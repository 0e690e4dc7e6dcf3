"""Where records come from: the formats by the suffixes of their files, and what a name stands for.

A name is, in this order:
1. a file: of records where `FORMATS` knows its suffix, in any case, and else one text;
2. a directory: of texts, which are all its files that are not hidden, in the order of their paths; or a copy
   of a dataset, where `datasets` saved it or there are files of records in it;
3. the name of a dataset of the Hub, "owner/name" (`qpa.training.data.sources.dataset`).

To add a format, write a file of its own and add a line to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpa.documents.data_summary import HubDataset
from qpa.errors import DataError
from qpa.registry import Registry
from qpa.training.data.records import Record
from qpa.training.data.sources.dataset import DatasetName, is_hub_name, is_saved, read_dataset
from qpa.training.data.sources.text_file import read_text

Reader = Callable[[Path], Iterator[Record]]

_ROOM = "qpa.training.data.sources"
FORMATS: Registry[Reader] = Registry(
    "data",
    {
        ".jsonl": f"{_ROOM}.json_file:read_json",
        ".ndjson": f"{_ROOM}.json_file:read_json",
        ".json": f"{_ROOM}.json_file:read_json",
        ".csv": f"{_ROOM}.csv_file:read_csv",
        ".tsv": f"{_ROOM}.csv_file:read_csv",
        ".parquet": f"{_ROOM}.parquet_file:read_parquet",
    },
)
"""What reads the records of a file, by its suffix."""


@dataclass(frozen=True)
class Sources:
    """What all names of one split hold together.

    Args:    subject: the names, for errors.
             texts: the texts, in order, with their files; () where there are records.
             records: all records, in order; () where there are texts.
             hub: the datasets of the Hub among them.
    """

    subject: str
    texts: tuple[tuple[str, str], ...]
    records: tuple[Record, ...]
    hub: tuple[HubDataset, ...]


def read_sources(names: Sequence[str], revision: str | None) -> Sources:
    """Read everything that a few names stand for.

    Raises:  DataError: something is missing, empty or damaged, or there are texts beside records.
    """
    texts: list[tuple[str, str]] = []
    records: list[Record] = []
    hub: list[HubDataset] = []
    for name in names:
        path = Path(name.partition(":")[0] if not Path(name).exists() else name)
        if path.is_dir():
            files = _files_in(path)
            if is_saved(path) or any(_has_records(file) for file in files):
                records += read_dataset(DatasetName.parse(name), None)[0]
            else:
                texts += [(str(file), read_text(file)) for file in files]
        elif path.is_file() or not is_hub_name(name) or _has_records(Path(name)):
            _read_file(path if path.is_file() else Path(name), texts, records)
        else:
            found, commit = read_dataset(DatasetName.parse(name), revision)
            records += found
            hub.append(HubDataset(name=name, revision=commit))
    subject = ", ".join(names)
    if texts and records:
        raise DataError(subject, "texts or records", "both", "train on one of them")
    if not texts and not records:
        raise DataError(subject, "text", "no rows")
    return Sources(subject, tuple(texts), tuple(records), tuple(hub))


def _read_file(path: Path, texts: list[tuple[str, str]], records: list[Record]) -> None:
    if not _has_records(path):
        texts.append((str(path), read_text(path)))
        return
    before = len(records)
    records += FORMATS[path.suffix.lower()](path)
    if len(records) == before:
        raise DataError(str(path), "rows", "none")


def _has_records(path: Path) -> bool:
    return path.suffix.lower() in FORMATS


def _files_in(folder: Path) -> list[Path]:
    """Return the files of a directory and of those below it that are not hidden, in a fixed order.

    Raises:  DataError: there are none.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)]
    if not files:
        raise DataError(str(folder), "a directory with text files or a dataset", "no files")
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
