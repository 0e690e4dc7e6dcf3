"""Safetensors files, a tensor at a time: what is in memory is one tensor, whatever the file's size.

A file is eight bytes with the header's length, little-endian; the header, which is JSON and gives type, shape
and place of each tensor by its name; and the numbers. Larger types come first, then names in order, as in the
safetensors library, whose own functions want all tensors at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from qpa.documents import Attachment
from qpa.errors import DocumentError, one_sentence
from qpa.store.disk_space import room_for

Array = npt.NDArray[Any]

_BLOCK_BYTES = 8 << 20

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Types of the format that numpy can hold; a tensor of another type cannot be read here."""


class TensorEntry(NamedTuple):
    """A tensor as the header describes it; start and end are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorPlan(NamedTuple):
    """A tensor to be written: its name, its type as in `DTYPES`, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Return the size of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file on disk.

    Args:    entries: by name, in the order of the file.
             metadata: the header's own strings.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header, with the safetensors library.

        Raises:  DocumentError: the file is missing, cut short, or no safetensors file.
        """
        try:
            with safe_open(path, framework="numpy") as reader:
                metadata = reader.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise DocumentError(str(path), "a whole safetensors file", one_sentence(error)) from error
        with path.open("rb") as stream:
            n_header = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(n_header))
        first = 8 + n_header
        entries = {
            name: TensorEntry(
                entry["dtype"], tuple(entry["shape"]), *(first + i for i in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        in_file_order = dict(sorted(entries.items(), key=lambda item: item[1].start))
        return cls(path, in_file_order, metadata)

    def read(self, name: str) -> Array:
        """Return one tensor, in memory of its own.

        Raises:  DocumentError: numpy has no such type.
        """
        dtype, shape, start, end = self._entry(name)
        # Not through a memory map, whose pages would count as this process's memory.
        with self.path.open("rb") as stream:
            stream.seek(start)
            numbers = np.fromfile(stream, dtype=np.uint8, count=end - start)
        return numbers.view(DTYPES[dtype]).reshape(shape)

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield one tensor's numbers in order, as 1-D arrays of a few megabytes.

        Raises:  DocumentError: numpy has no such type.
        """
        dtype, _, start, end = self._entry(name)
        with self.path.open("rb") as stream:
            for first in range(start, end, _BLOCK_BYTES):
                stream.seek(first)
                numbers = np.fromfile(stream, dtype=np.uint8, count=min(_BLOCK_BYTES, end - first))
                yield numbers.view(DTYPES[dtype])

    def _entry(self, name: str) -> TensorEntry:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise DocumentError(f"{name} in {self.path}", f"a type among {', '.join(DTYPES)}", entry.dtype)
        return entry


def write_tensors(
    path: Path,
    plans: Iterable[TensorPlan],
    read: Callable[[str], Array],
    metadata: Mapping[str, str] | None = None,
) -> Attachment:
    """Write a safetensors file, asking for one tensor after the other.

    Args:    path: of a new file, in a directory that is there.
             plans: every tensor, in any order.
             read: returns the tensor of a name, of its plan's type and shape.
    Returns: the file's name, digest and length.
    Raises:  DiskFullError, OSError: it cannot be written; what is there is then cut short.
    """
    ordered = sorted(plans, key=lambda plan: (-DTYPES[plan.dtype].itemsize, plan.name))
    header = _header(ordered, metadata or {})
    n_bytes = len(header) + sum(plan.n_bytes for plan in ordered)
    with room_for(path, n_bytes), path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        stream = _Hashed(file, beside)
        stream.write(header)
        for plan in ordered:
            array = read(plan.name)
            if array.shape != plan.shape or array.dtype != DTYPES[plan.dtype]:
                found = f"{array.dtype}{list(array.shape)}"
                raise DocumentError(plan.name, f"{plan.dtype}{list(plan.shape)}", found)
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            for start in range(0, len(content), _BLOCK_BYTES):
                stream.write(content[start : start + _BLOCK_BYTES])
            del content
            del array  # before the next one is read
    return Attachment(file=path.name, sha256=stream.digest.hexdigest(), n_bytes=stream.n_bytes)


def _header(plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for plan in plans:
        start, end = end, end + plan.n_bytes
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


class _Hashed:
    """A stream that counts what is written, and digests it in a thread meanwhile."""

    def __init__(self, stream: BinaryIO, beside: Executor) -> None:
        self.stream, self.beside = stream, beside
        self.digest = hashlib.sha256()
        self.n_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        digested = self.beside.submit(self.digest.update, content)
        self.stream.write(content)
        self.n_bytes += len(content)
        digested.result()
