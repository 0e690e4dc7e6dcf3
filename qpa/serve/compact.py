"""The compact file: the trained numbers of an adapter, and the digests of what else it takes to expand them.

Everything is little-endian, and nothing is padded.

    offset  bytes  what
    0       4      "QPAC"
    4       2      the version, an unsigned integer; this file writes and reads 1
    6       1      the type of the numbers: 0 is float32, 1 is a signed integer of 16 bits
    7       1      bit 0: 1 where the first array has probabilities in the place of angles; bits 1 to 7: the
                   number of the basis's bank whose directions the adapter has, from 0
    8       32     the digest of the basis: the SHA-256 of its basis.json
    40      32     the digest of the layout: the SHA-256 of its JSON document
    72      2      the number of arrays, an unsigned integer
    74      4, 8   for each array its length, an unsigned integer of 4 bytes; where numbers are integers, also
                   the array's scale, a float32 of 4 bytes that is finite and not negative
                   the numbers, array after array
                   32 bytes, the SHA-256 of everything before

An integer n stands for n * scale, a float32 product. The first arrays are those of the features: angles of
circuit after circuit, or the numbers of the layout's features. The weights of each group's decoder follow in
the layout's order, chunk number after chunk number and for each the features.

Source: ours.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np

from qpa.errors import DocumentError
from qpa.serve.arithmetic import Array
from qpa.serve.files import read_whole

MAGIC = b"QPAC"
VERSION = 1
NUMBERS = ("float32", "int16")

_HEAD = struct.Struct("<4sHBB32s32sH")
_N_DIGEST = 32
_LARGEST = 32767

MAX_BYTES = 64 << 20
"""The largest size of a compact file: of more numbers than any generator has."""

Numbers = Literal["float32", "int16"]


@dataclass(frozen=True)
class Head:
    """What a compact file says before its numbers.

    Args:    basis, layout: SHA-256 digests.
             lengths: of the arrays.
    """

    basis: bytes
    layout: bytes
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Compact:
    """What a compact file says.

    Args:    basis, layout: SHA-256 digests.
             are_probabilities: whether the first array has probabilities in the place of angles.
             arrays: float32[n] each.
             bank: the number of the basis's bank.
    """

    basis: bytes
    layout: bytes
    are_probabilities: bool
    arrays: tuple[Array, ...]
    bank: int = 0

    def as_bytes(self, numbers: Numbers = "float32") -> bytes:
        """Return the file.

        Args:    numbers: "int16" rounds each number to the nearest of 65,535 multiples of a scale, which is
                 the array's largest size divided by 32,767.
        Raises:  DocumentError: a number is not finite.
        """
        for number, array in enumerate(self.arrays):
            if not np.all(np.isfinite(array)):
                raise DocumentError(f"array {number} of the adapter", "finite numbers", "NaN or infinity")
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            NUMBERS.index(numbers),
            self.are_probabilities | self.bank << 1,
            self.basis,
            self.layout,
            len(self.arrays),
        )
        lengths, content = [], []
        for array in self.arrays:
            if numbers == "float32":
                lengths.append(struct.pack("<I", len(array)))
                content.append(array.astype("<f4").tobytes())
                continue
            scale = np.float32(np.abs(array).max(initial=0.0)) / np.float32(_LARGEST)
            steps = np.rint(array.astype(np.float64) / float(scale)) if scale > 0 else np.zeros(len(array))
            lengths.append(struct.pack("<If", len(array), scale))
            content.append(np.clip(steps, -_LARGEST, _LARGEST).astype("<i2").tobytes())
        whole = b"".join((head, *lengths, *content))
        return whole + hashlib.sha256(whole).digest()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:  DocumentError: it cannot be read, or `parse` refuses it.
        """
        return cls.parse(str(path), read_whole(path, MAX_BYTES))

    @classmethod
    def parse(cls, subject: str, content: bytes) -> Self:
        """Read a file's bytes.

        Args:    subject: its path, for errors.
        Raises:  DocumentError: it is cut short, damaged, newer, or no such file.
        """
        if content[:4] != MAGIC:
            raise DocumentError(subject, "a compact adapter, which starts with QPAC", _words(content[:4]))
        if len(content) < _HEAD.size + _N_DIGEST:
            raise _cut_short(subject, _HEAD.size + _N_DIGEST, len(content))
        _, version, kind, flags, basis, layout, n_arrays = _HEAD.unpack_from(content)
        if version != VERSION:
            advice = "install a newer qpa" if version > VERSION else ""
            raise DocumentError(subject, f"version {VERSION} of the format", f"version {version}", advice)
        whole, digest = content[:-_N_DIGEST], content[-_N_DIGEST:]
        if hashlib.sha256(whole).digest() != digest:
            raise DocumentError(
                subject,
                "the SHA-256 that it ends with",
                "another",
                "it is damaged or cut short; copy it again",
            )
        if kind >= len(NUMBERS):
            raise DocumentError(subject, "numbers of type 0 or 1", f"type {kind}")
        arrays = _arrays(subject, whole, NUMBERS[kind], n_arrays)
        return cls(basis, layout, bool(flags & 1), arrays, flags >> 1)


def is_compact(path: Path) -> bool:
    """Return whether a path is a file that starts as a compact adapter does."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def head_of(subject: str, stream: BinaryIO) -> Head:
    """Read a file's head alone; the checksum is not looked at, which covers the numbers.

    Args:    subject: the file's path, for errors.
    Raises:  DocumentError: it is cut short, newer, or no such file.
    """
    content = stream.read(_HEAD.size)
    if content[:4] != MAGIC:
        raise DocumentError(subject, "a compact adapter, which starts with QPAC", _words(content[:4]))
    if len(content) < _HEAD.size:
        raise _cut_short(subject, _HEAD.size, len(content))
    _, version, kind, _, basis, layout, n_arrays = _HEAD.unpack(content)
    if version != VERSION or kind >= len(NUMBERS):
        found = f"version {version} with numbers of type {kind}"
        raise DocumentError(subject, f"version {VERSION} of the format", found, "install a newer qpa")
    entry = _entry(NUMBERS[kind])
    content = stream.read(n_arrays * entry.size)
    if len(content) < n_arrays * entry.size:
        raise _cut_short(subject, _HEAD.size + n_arrays * entry.size, _HEAD.size + len(content))
    return Head(basis, layout, tuple(length for length, *_ in entry.iter_unpack(content)))


def _entry(numbers: str) -> struct.Struct:
    return struct.Struct("<I" if numbers == "float32" else "<If")


def _arrays(subject: str, whole: bytes, numbers: str, n_arrays: int) -> tuple[Array, ...]:
    entry = _entry(numbers)
    itemsize = 4 if numbers == "float32" else 2
    start = _HEAD.size + n_arrays * entry.size
    if start > len(whole):
        raise _cut_short(subject, start, len(whole))
    entries = [entry.unpack_from(whole, _HEAD.size + number * entry.size) for number in range(n_arrays)]
    n_expected = start + itemsize * sum(length for length, *_ in entries)
    if n_expected != len(whole):
        raise DocumentError(
            subject, f"{n_expected + _N_DIGEST:,} bytes, as its lengths say", f"{len(whole) + _N_DIGEST:,}"
        )
    arrays = []
    for number, (length, *scale) in enumerate(entries):
        found = np.frombuffer(whole, "<f4" if numbers == "float32" else "<i2", length, start)
        start += itemsize * length
        array = found.astype(np.float32)
        if scale:
            with np.errstate(over="ignore", invalid="ignore"):
                array *= np.float32(scale[0])
        if not np.all(np.isfinite(array)) or (scale and not scale[0] >= 0):
            raise DocumentError(f"{subject} array {number}", "finite numbers", "NaN or infinity")
        arrays.append(array)
    return tuple(arrays)


def _cut_short(subject: str, n_expected: int, n_found: int) -> DocumentError:
    return DocumentError(
        subject, f"at least {n_expected} bytes", str(n_found), "it is cut short; copy it again"
    )


def _words(start: bytes) -> str:
    return repr(start)[1:] if start else "an empty file"
