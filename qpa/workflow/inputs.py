"""What a run reads from outside: the base model and the data, told apart by their content.

Rules:
1. A file's digest is that of its bytes; a directory's that of the names and digests of its files. Times do
   not count.
2. Of a file above `_WHOLE_BYTES`, as weights are, its length and `_N_BLOCKS` evenly spaced blocks count, the
   first and the last among them: a model that was trained anew differs everywhere.
3. What is no path of this machine is a name on the Hub. It is told by its name and the revision that is asked
   for: which commit that is today is not looked up.
4. A name that looks like a path, or that was one when the run was made, is never looked for on the Hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from qpa.documents import Input, ResolvedConfiguration
from qpa.documents.base import OptionValue
from qpa.errors import ConfigurationError
from qpa.pipeline.configuration import Configuration, Schema
from qpa.store.atomic_files import sha256_of

_BLOCK_BYTES = 1 << 20
_N_BLOCKS = 64
_WHOLE_BYTES = _N_BLOCKS * _BLOCK_BYTES

MODEL = "plan.model"
_REVISIONS = {
    MODEL: "plan.revision",
    "train.data": "train.data_revision",
    "train.eval_data": "train.data_revision",
}
_READ_SECTIONS = ("plan.", "train.")
_CONTENT = "sha256:"
_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def read_inputs(configuration: Configuration) -> tuple[Input, ...]:
    """Return what the options of a configuration name, with digests, sorted by option.

    Raises:  OSError: a file cannot be read.
    """
    found = []
    for key, names in _named(configuration):
        revision = configuration.values.get(_REVISIONS.get(key, ""))
        digests = [_digest(name, revision) for name in names]
        digest = digests[0] if len(digests) == 1 else _CONTENT + _sha256("\n".join(digests).encode())
        found.append(Input(option=key, name=",".join(names), digest=digest))
    return tuple(found)


def check_inputs(configuration: Configuration, before: ResolvedConfiguration | None) -> None:
    """Check that what is no name on the Hub is there.

    Raises:  ConfigurationError: it is not; the error names its line.
    """
    inputs = before.inputs if before else ()
    known = {name for one in inputs if one.digest.startswith(_CONTENT) for name in one.name.split(",")}
    for key, names in _named(configuration):
        for name in names:
            is_local = name in known or key in OF_THE_PLAN or _looks_local(name)
            if is_local and not _digest(name, None).startswith(_CONTENT):
                place = configuration.place_of(key)
                raise ConfigurationError(place, "a file or directory", f"no such file: {name}")


def _named(configuration: Configuration) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the options that name something to read, sorted, and the names."""
    options = Schema().options
    keys = [key for key, one in options.items() if key.startswith(_READ_SECTIONS) and one.is_path]
    for key in sorted([MODEL, *keys]):
        value = configuration.values.get(key)
        if value is not None:
            yield key, value if isinstance(value, tuple) else (str(value),)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(_SUFFIXES)


OF_THE_PLAN = ("plan.basis", "plan.continue_from")
"""Options that name directories of qpa's own: they are never of the Hub, and a plan keeps what it takes."""


def changed_inputs(before: tuple[Input, ...], now: tuple[Input, ...]) -> list[str]:
    """Return in words which inputs are others, or hold something else than before."""
    old = {one.option: one for one in before}
    new = {one.option: one for one in now}
    words = []
    for option in sorted(old.keys() | new.keys()):
        if option not in new:
            words.append(f"{option} {old[option].name} is no longer given")
        elif option not in old:
            words.append(f"{option} {new[option].name} is new")
        elif old[option].name != new[option].name and _differ(old[option], new[option]):
            words.append(f"{option} {old[option].name} -> {new[option].name}")
        elif old[option].digest != new[option].digest:
            words.append(f"the content of {option} {new[option].name} changed")
    return words


def _differ(one: Input, other: Input) -> bool:
    """Return whether two names stand for other things; the same file may have moved."""
    return one.digest != other.digest or not one.digest.startswith(_CONTENT)


def _digest(name: str, revision: OptionValue) -> str:
    path = Path(name if Path(name).exists() else name.partition(":")[0])  # of a dataset, DIRECTORY::SPLIT
    if path.is_dir():
        files = sorted(_files(path), key=lambda file: file.relative_to(path).as_posix())
        lines = [f"{file.relative_to(path).as_posix()} {_digest_of_file(file)}" for file in files]
        return _CONTENT + _sha256("\n".join(lines).encode())
    if path.is_file():
        return _CONTENT + _digest_of_file(path)
    return f"hub:{revision or 'newest'}"


def _files(directory: Path) -> Iterator[Path]:
    """Yield the files of a directory; hidden ones, such as caches of the Hub's client, are left out."""
    for path in directory.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts):
            yield path


def _digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, or of its length and a part of it, see rule 2."""
    n_bytes = path.stat().st_size
    if n_bytes <= _WHOLE_BYTES:
        return sha256_of(path)
    with path.open("rb") as stream:
        hashed = hashlib.sha256(str(n_bytes).encode())
        for number in range(_N_BLOCKS):
            stream.seek(number * (n_bytes - _BLOCK_BYTES) // (_N_BLOCKS - 1))
            hashed.update(stream.read(_BLOCK_BYTES))
    return hashed.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
