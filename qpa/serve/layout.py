"""What the expansion needs of a layout, in a file of its own that all adapters of one size share.

A layout says which numbers of an adapter form a chunk, which features give a chunk, and by which decoder.
The file is JSON and holds the fields `features`, `ansatz` and `groups` of the WeightLayout document that
`qpa plan` writes, and the name of its own schema. Its name is the SHA-256 of its bytes. Whoever sends a
compact adapter may have written the layout too, so that nothing of it is believed.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, cast

from qpa.errors import DocumentError
from qpa.serve.files import read_whole

SCHEMA = "qpa.compact-layout/1"
DIRECTORY = "layouts"
"""Where layouts lie, beside the compact files that name them."""

MAX_QUBITS = 20
MAX_AMPLITUDES = 1 << 26
"""The most basis states of all circuits together: half a gigabyte of numbers."""

MAX_TURNS = 1 << 34
"""The most rotations of amplitudes, or terms of a control, over all basis states: minutes of computing."""

MAX_BYTES = 256 << 20
_MAX_COUNT = 1 << 31

Axis = Literal["row", "column", "spectrum"]


@dataclass(frozen=True)
class Group:
    """Chunks that share a decoder.

    Args:    axis: "row" of a lora_A, "column" of a lora_B, or "spectrum", factors of the basis's directions.
             chunks: by the path of a tensor, the numbers of the chunks that fill it; none for the lora_A of a
             spectrum.
             n_directions: by the path of a spectrum's tensor, how many of its directions there are.
             states: the basis state of every chunk.
             chunk_size: the numbers of a chunk.
             n_features: how many features the decoder sees.
    """

    name: str
    axis: Axis
    chunks: Mapping[str, tuple[int, ...]]
    n_directions: Mapping[str, int]
    states: tuple[int, ...]
    chunk_size: int
    n_features: int


@dataclass(frozen=True)
class Layout:
    """A layout as far as it is needed.

    Args:    digest: SHA-256 of the document's bytes.
             features: the kind of features.
             n_window_qubits: None where circuits start at random.
             registers, n_control: as in the WeightLayout.
             ansatz: the kind of the ansatz.
    """

    digest: bytes
    features: str
    n_circuits: int
    n_window_qubits: int | None
    registers: tuple[int, ...]
    n_control: int
    ansatz: str
    n_qubits: int
    n_layers: int
    groups: tuple[Group, ...]

    @property
    def n_states(self) -> int:
        """Return the number of basis states."""
        return 1 << self.n_qubits

    @property
    def states(self) -> list[int]:
        """Return the basis states of all chunks, group by group."""
        return [state for group in self.groups for state in group.states]

    @classmethod
    def read(cls, compact: Path, digest: bytes) -> Self:
        """Read the layout of a compact file.

        Args:    compact: the file, beside which the directory of the layouts lies.
                 digest: of the layout.
        Raises:  DocumentError: it is missing, damaged, or none that can be expanded.
        """
        path = compact.parent / DIRECTORY / f"{digest.hex()}.json"
        content = read_whole(path, MAX_BYTES, f"copy it from where {compact.name} was exported")
        layout = cls.parse(str(path), content)
        if layout.digest != digest:
            found = f"{layout.digest.hex()[:12]}..: it was edited or damaged"
            raise DocumentError(str(path), "the SHA-256 that its name says", found, "copy it again")
        return layout

    @classmethod
    def parse(cls, subject: str, content: bytes) -> Self:
        """Read the bytes of a document.

        Args:    subject: the file, for errors.
        Raises:  DocumentError: they are no layout that can be expanded.
        """
        try:
            layout = cls._read(json.loads(content), hashlib.sha256(content).digest())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            found = f"{type(error).__name__}: {str(error)[:100]}"
            raise DocumentError(subject, "a layout that can be expanded", found) from error
        return layout

    @classmethod
    def _read(cls, content: Any, digest: bytes) -> Self:
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {str(content['schema'])[:60]}, and not {SCHEMA}")
        features, ansatz = content["features"], content["ansatz"]
        if features["has_index_bits"]:
            raise ValueError("features with the bits of a basis state")
        if features["contexts"] is not None:
            raise ValueError("features that contexts program")
        windows = features["windows"]
        return cls(
            digest=digest,
            features=_text(features["kind"]),
            n_circuits=_count(features["n_circuits"], at_least=1),
            n_window_qubits=None
            if windows is None
            else _count(windows["n_window_qubits"], at_most=MAX_QUBITS),
            registers=_counts(features["registers"]),
            n_control=_count(features["n_control"]),
            ansatz=_text(ansatz["kind"]),
            n_qubits=_count(ansatz["n_qubits"], at_least=1, at_most=MAX_QUBITS),
            n_layers=_count(ansatz["n_layers"], at_least=1),
            groups=tuple(map(_group, content["groups"])),
        )

    def __post_init__(self) -> None:
        """Check everything on which an index or a size depends.

        Raises:  ValueError: something is out of range.
        """
        if (self.n_window_qubits or 0) > self.n_qubits:
            raise ValueError(f"windows of {self.n_window_qubits} of {self.n_qubits} qubits")
        if self.registers and (min(self.registers) < 1 or sum(self.registers) != self.n_qubits):
            raise ValueError(f"registers that do not make {self.n_qubits} qubits")
        if self.n_circuits * self.n_states > MAX_AMPLITUDES:
            raise ValueError(f"{self.n_circuits} circuits of {self.n_qubits} qubits, too many to expand")
        n_turns = self.n_states * max(self.n_circuits * self.n_layers * self.n_qubits, self.n_control)
        if n_turns > MAX_TURNS:
            raise ValueError(f"{self.n_layers} layers and {self.n_control} numbers, too many to expand")
        if not self.groups:
            raise ValueError("no groups")
        if not all(state < self.n_states for state in self.states):
            raise ValueError(f"basis states that {self.n_qubits} qubits do not have")
        for group in self.groups:
            if group.n_features != self.n_circuits:
                raise ValueError(f"{group.name}: a decoder of {group.n_features} features")
            used = chain.from_iterable(group.chunks.values())
            if not all(chunk < len(group.states) for chunk in used):
                raise ValueError(f"{group.name}: chunks that it does not have")


def _group(content: Any) -> Group:
    decoder, axis = content["decoder"], content["axis"]
    if axis not in ("row", "column", "spectrum"):
        raise ValueError(f"chunks along the axis {str(axis)[:20]}")
    widths = _counts(decoder["widths"])
    if len(widths) != 2 or decoder["has_bias"] or decoder["kind"] != "linear":
        raise ValueError("a decoder that is not one linear layer without a bias")
    n_features, chunk_size = widths
    if chunk_size != content["chunk_size"] or not chunk_size:
        raise ValueError("a decoder of another size than the chunks")
    tensors = {_text(tensor["path"]): _counts(tensor["chunks"]) for tensor in content["tensors"]}
    if not tensors or not content["states"]:
        raise ValueError("a group without tensors or without chunks")
    return Group(
        name=_text(content["name"]),
        axis=cast(Axis, axis),
        chunks=tensors,
        n_directions=_directions(tensors, chunk_size) if axis == "spectrum" else {},
        states=_counts(content["states"]),
        chunk_size=chunk_size,
        n_features=n_features,
    )


def _directions(tensors: Mapping[str, tuple[int, ...]], chunk_size: int) -> dict[str, int]:
    """Return the numbers of directions: those of a lora_A are those of the lora_B behind it."""
    paths = list(tensors)
    found: dict[str, int] = {}
    for a, b in zip(paths[::2], paths[1::2], strict=True):
        if tensors[a] or not tensors[b]:
            raise ValueError("a spectrum without lora_A and lora_B in turn")
        found |= dict.fromkeys((a, b), chunk_size * len(tensors[b]))
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is expected, and not {str(value)[:40]}")
    return value


def _count(value: Any, at_least: int = 0, at_most: int = _MAX_COUNT) -> int:
    if type(value) is not int or not at_least <= value <= at_most:
        raise ValueError(
            f"a whole number from {at_least} to {at_most} is expected, and not {str(value)[:40]}"
        )
    return value


def _counts(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(_count, values))
