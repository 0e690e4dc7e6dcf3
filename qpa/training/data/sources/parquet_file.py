"""Records of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qpa.errors import DataError, one_sentence
from qpa.training.data.records import Origin, Record


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a file.

    Raises:  DataError: the file is missing or damaged.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if not path.is_file():
        raise DataError(str(path), "a data file", "a directory" if path.is_dir() else "no such file")
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for content in batch.to_pylist():
                    number += 1
                    yield Record(content, Origin(str(path), "row", number))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), "a Parquet file", one_sentence(error)) from error
