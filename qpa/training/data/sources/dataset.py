"""Records of a dataset that the library `datasets` reads: of the Hub, of a copy of one, or saved by it.

A name is NAME, NAME:CONFIGURATION, NAME::SPLIT or NAME:CONFIGURATION:SPLIT, such as
"openai/gsm8k:main:test"; the split is "train" unless another one is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qpa.errors import DataError, one_sentence
from qpa.training.data.records import Origin, Record

_SAVED = ("dataset_info.json", "dataset_dict.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"@([0-9a-f]{40})/")


class DatasetName(NamedTuple):
    """A dataset's name or directory, configuration and split; None is the default."""

    name: str
    configuration: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """Read "NAME:CONFIGURATION:SPLIT", of which the last two may be left out.

        Raises:  DataError: there are more than three parts.
        """
        name, configuration, split, *more = [*text.split(":"), "", ""]
        if any(more):
            raise DataError(text, "NAME:CONFIGURATION:SPLIT", "more parts")
        return cls(name, configuration or None, split or "train")


def is_hub_name(text: str) -> bool:
    """Return whether a text may be the name of a dataset of the Hub: "owner/name", with what may follow."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(:[^/]*)?", text) is not None


def is_saved(folder: Path) -> bool:
    """Return whether a directory was written by `Dataset.save_to_disk`."""
    return any((folder / file).is_file() for file in _SAVED)


def read_dataset(dataset: DatasetName, revision: str | None) -> tuple[Iterator[Record], str | None]:
    """Return the records of a dataset, and the revision that was read; None for a directory.

    Raises:  DataError: there is no such dataset, configuration or split, or it cannot be reached.
    """
    found, revision = _load(dataset, revision)
    place = f"{dataset.name} ({dataset.split})"
    records = (Record(content, Origin(place, "row", number)) for number, content in enumerate(found, start=1))
    return records, revision


def _load(dataset: DatasetName, revision: str | None) -> tuple[Any, str | None]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    name, configuration, split = dataset
    folder = Path(name)
    try:
        if is_saved(folder):
            found = load_from_disk(name)
            return (found[split] if isinstance(found, DatasetDict) else found), None
        if folder.is_dir():
            return load_dataset(name, configuration, split=split), None
        revision = _resolved(name, revision)
        found = load_dataset(name, configuration, split=split, revision=revision)
    except Exception as error:  # of datasets, pyarrow, the Hub's client and what reads the files
        advice = "name the configuration and split as NAME:CONFIGURATION:SPLIT"
        raise DataError(name, f'a dataset with a split "{split}"', one_sentence(error), advice) from error
    return found, _checked(name, _revision_of(found), revision)


def _resolved(name: str, revision: str | None) -> str | None:
    """Return the commit that a revision of the Hub is now; the revision as it is where no Hub is reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except HfHubHTTPError:
        raise
    except (OSError, OfflineModeIsEnabled):
        return revision


def _checked(name: str, found: str | None, wanted: str | None) -> str | None:
    """Return the commit that was read.

    Raises:  DataError: it is not the wanted one: what is kept on this machine counts where no Hub is reached.
    """
    if found and wanted and found != wanted and _COMMIT.fullmatch(wanted):
        raise DataError(name, f"revision {wanted}", found, "go online to fetch it")
    return found or wanted


def _revision_of(found: Any) -> str | None:
    """Return the commit that is in the addresses from which a dataset was read once, and then kept."""
    addresses = " ".join(found.info.download_checksums or ())
    match = _REVISION.search(addresses)
    return match[1] if match else None
