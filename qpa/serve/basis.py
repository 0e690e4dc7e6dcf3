"""The basis directory: what all compact adapters of one base model share.

    basis.json             a document of qpa, which says what follows; the SHA-256 of its bytes is the digest
                           that a compact file names
    <sha256>.safetensors   for every tensor of the adapter by its path: of a lora_A float32[rank, in] and of a
                           lora_B float32[out, rank] the directions; by "initial." and the path of a lora_A
                           its values as drawn; by "bank.1." and the path the directions in the second bank,
                           and so on
    adapter-spec.json      the plan of the adapter, which only `qpa plan` reads

A *bank* holds the directions of one kind of text; an adapter's are those of one bank.

Of basis.json these fields are read here: `schema`, `base.name_or_path`, `lora_config` (the text of
adapter_config.json), `scale` (what lora_B is multiplied by), `tensors` (each with `path`, `key` in
adapter_model.safetensors, `factor`, which is A or B, and `shape`), `arrays.file` with `arrays.sha256`, and
`banks` (each with its `name`), of which version 1 had one and no such field.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from qpa.errors import DocumentError, one_of, one_sentence
from qpa.serve.arithmetic import Array
from qpa.serve.decoding import Shape
from qpa.serve.files import read_whole
from qpa.store.atomic_files import sha256_of

FILE = "basis.json"
INITIAL_PREFIX = "initial."
VERSIONS = (1, 2)

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Basis:
    """A basis whose files have been checked.

    Args:    digest: SHA-256 of basis.json.
             base: the name of the base model.
             config: the content of adapter_config.json; config_text: its bytes.
             scale: what lora_B is multiplied by, alpha / rank.
             shapes: of every tensor by its path; keys: its name in adapter_model.safetensors.
             first_factors: the paths of every lora_A, which has initial values and is not scaled.
             banks: the names of the kinds of text that directions are of.
             arrays: the safetensors file.
    """

    directory: Path
    digest: bytes
    base: str
    config: Mapping[str, Any]
    config_text: bytes
    scale: float
    shapes: Mapping[str, Shape]
    keys: Mapping[str, str]
    first_factors: frozenset[str]
    banks: tuple[str, ...]
    arrays: Path

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read a basis, and check the digest, names, types and shapes of its arrays.

        Raises:  DocumentError: a file is missing, damaged, newer, or not what it should be.
        """
        path = directory / FILE
        content = read_whole(path, _MAX_BYTES, "name a directory that qpa basis wrote")
        try:
            basis = cls._read(directory, json.loads(content), hashlib.sha256(content).digest())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            found = f"{type(error).__name__}: {str(error)[:100]}"
            raise DocumentError(str(path), "a document of qpa basis", found) from error
        sha256 = json.loads(content)["arrays"]["sha256"]
        try:
            found = sha256_of(basis.arrays)
        except OSError as error:
            words = error.strerror or type(error).__name__
            raise DocumentError(
                str(basis.arrays), "the basis's arrays", words, "copy the basis again"
            ) from error
        if found != sha256:
            advice = "it is damaged; copy the basis again"
            raise DocumentError(str(basis.arrays), f"SHA-256 {str(sha256)[:12]}..", f"{found[:12]}..", advice)
        with basis.reading() as reading:
            reading.check()
        return basis

    @classmethod
    def _read(cls, directory: Path, content: Any, digest: bytes) -> Self:
        schema = str(content["schema"])
        known = [f"qpa.basis/{version}" for version in VERSIONS]
        if schema not in known:
            raise ValueError(f"schema {schema[:40]}, and not {one_of(known)}")
        banks = ("data",) if schema == known[0] else tuple(_text(bank["name"]) for bank in content["banks"])
        if not banks:
            raise ValueError("no bank")
        file, scale, config = content["arrays"]["file"], content["scale"], json.loads(content["lora_config"])
        if file != f"{content['arrays']['sha256']}.safetensors" or not file[:-12].isalnum():
            raise ValueError("arrays in a file of another name than their digest")
        if not isinstance(scale, float | int) or not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"a scale of {str(scale)[:40]}")
        if not isinstance(config, dict):
            raise TypeError("adapter_config.json is an object")
        tensors = content["tensors"]
        shapes = {_text(one["path"]): Shape(*map(_size, one["shape"])) for one in tensors}
        keys = {one["path"]: _text(one["key"]) for one in tensors}
        if not tensors or len({*keys.values()}) != len(tensors) or "__metadata__" in keys.values():
            raise ValueError("tensors without keys of their own")
        return cls(
            directory=directory,
            digest=digest,
            base=_text(content["base"]["name_or_path"]),
            config=config,
            config_text=content["lora_config"].encode(),
            scale=float(scale),
            shapes=shapes,
            keys=keys,
            first_factors=frozenset(one["path"] for one in tensors if one["factor"] == "A"),
            banks=banks,
            arrays=directory / file,
        )

    def check_own(self, subject: str, digest: bytes, bank: int) -> None:
        """Check that a compact adapter is one of this basis.

        Args:    subject: its path, for errors.
                 digest, bank: what it says of its basis.
        Raises:  DocumentError: it is of another basis, or of a bank that there is not.
        """
        if digest != self.digest:
            found = f"basis {digest.hex()[:12]}"
            raise DocumentError(subject, f"basis {self.digest.hex()[:12]}", found)
        self.check_bank(subject, bank)

    def check_bank(self, subject: str, bank: int) -> None:
        """Check that there is a bank.

        Args:    subject: the compact adapter's path, for errors.
        Raises:  DocumentError: there is none of this number.
        """
        if bank >= len(self.banks):
            expected = f"a bank of the basis, which has {len(self.banks)}"
            raise DocumentError(subject, expected, f"number {bank}")

    @contextmanager
    def reading(self, bank: int = 0) -> Iterator[Reading]:
        """Open the arrays, to be read one at a time.

        Args:    bank: the number of the bank whose directions are read, one that there is.
        Raises:  DocumentError: the file is gone, or no safetensors file.
        """
        try:
            with safe_open(self.arrays, framework="numpy") as file:
                yield Reading(self, file, bank)
        except (SafetensorError, OSError) as error:
            raise DocumentError(str(self.arrays), "a safetensors file", one_sentence(error)) from error


class _Lazy(Mapping[str, Array]):
    """Arrays of a file by path, each read when it is asked for."""

    def __init__(self, file: Any, names: Mapping[str, str]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, path: str) -> Array:
        array: Array = self._file.get_tensor(self._names[path])
        return array

    def __contains__(self, path: object) -> bool:
        return path in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Reading:
    """The arrays of a basis while their file is open.

    Attributes:
             bases: the directions of every tensor by its path, in one bank.
             initial: the first values of every lora_A by its path.
    """

    def __init__(self, basis: Basis, file: Any, bank: int) -> None:
        self._basis, self._file = basis, file
        self.bases = _Lazy(file, {path: name_in_bank(path, bank) for path in basis.shapes})
        self.initial = _Lazy(file, {path: INITIAL_PREFIX + path for path in basis.first_factors})

    def check(self) -> None:
        """Check names, types and shapes.

        Raises:  DocumentError: they are not those of the document.
        """
        shapes = self._basis.shapes
        banks = range(len(self._basis.banks))
        expected = {name_in_bank(path, bank): shape for bank in banks for path, shape in shapes.items()}
        expected |= {INITIAL_PREFIX + path: shapes[path] for path in self.initial}
        names = {*self._file.keys()}
        for name in sorted(names ^ expected.keys()):
            words = ("an array", "none") if name in expected else ("no such array", "one")
            raise DocumentError(f"{name[:200]} of {self._basis.arrays}", *words)
        for name, shape in expected.items():
            array = self._file.get_slice(name)
            if tuple(array.get_shape()) != shape or array.get_dtype() != "F32":
                found = f"{array.get_dtype()}{array.get_shape()}"
                raise DocumentError(f"{name} of {self._basis.arrays}", f"F32{list(shape)}", found)


def name_in_bank(path: str, bank: int) -> str:
    """Return the name of the array with a tensor's directions in a bank."""
    return path if bank == 0 else f"bank.{bank}.{path}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is expected, and not {str(value)[:40]}")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ValueError(f"a size is expected, and not {str(value)[:40]}")
    return value
