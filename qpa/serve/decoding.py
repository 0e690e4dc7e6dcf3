"""From features and decoders to the adapter's numbers, with the same bits everywhere.

Rules:
1. Features and chunks are computed in float64, and a chunk's number is the sum of its features times the
   decoder's weights, feature after feature.
2. A chunk's numbers are rounded to float32. What follows is in float32: a column of a spectrum is the basis's
   column times its factor, and a tensor is its initial value plus what is generated.
3. Rows and columns lie in the order of the layout's groups; what no group fills is zero.
4. A tensor's chunks are decoded when the tensor is asked for, so that one tensor at a time is in memory.

Every operation is one that IEEE 754 prescribes to the last bit, see `qpa.serve.arithmetic`.

Source: ours; the rules are those of `qpa.generators.chunked`, which trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qpa.errors import DocumentError
from qpa.serve.arithmetic import Array
from qpa.serve.features import features_of, lengths_of
from qpa.serve.layout import Group, Layout


class Shape(NamedTuple):
    """The shape of a tensor of the adapter, [rank, in] of a lora_A or [out, rank] of a lora_B."""

    n_rows: int
    n_columns: int


@dataclass(frozen=True)
class Decoded:
    """A group whose chunks can be computed.

    Args:    features: float64[n_chunks, n_features], what the decoder sees of each chunk.
             weights: float64[chunk_size, n_features], the decoder.
    """

    group: Group
    features: Array
    weights: Array

    def chunks(self, path: str) -> Array:
        """Return the chunks that fill a tensor, float32[n_chunks, chunk_size]."""
        used = self.features[np.array(self.group.chunks[path], dtype=np.int64)]
        chunks = used[:, :1] * self.weights[:, 0]
        for number in range(1, self.group.n_features):
            chunks += used[:, number : number + 1] * self.weights[:, number]
        return chunks.astype(np.float32)


def lengths(layout: Layout, *, are_probabilities: bool) -> list[int]:
    """Return how many numbers each array of a compact file has.

    Raises:  DocumentError: such features are not computed here.
    """
    of_features = lengths_of(layout, are_probabilities=are_probabilities)
    return [*of_features, *(group.chunk_size * group.n_features for group in layout.groups)]


def decode(layout: Layout, arrays: Sequence[Array], *, are_probabilities: bool) -> list[Decoded]:
    """Return every group of a layout, ready to be computed.

    Args:    arrays: those of a compact file, of the lengths that `lengths` gives.
    Raises:  DocumentError: a number is out of the range in which features are computed.
    """
    n = len(lengths_of(layout, are_probabilities=are_probabilities))
    wide = [array.astype(np.float64) for array in arrays]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found in the tensors
        features = features_of(layout, wide[:n], are_probabilities=are_probabilities)
    return [
        Decoded(group, features[np.array(group.states)], weights.reshape(group.chunk_size, group.n_features))
        for group, weights in zip(layout.groups, wide[n:], strict=True)
    ]


def tensors_of(
    shapes: Mapping[str, Shape],
    initial: Mapping[str, Array],
    bases: Mapping[str, Array],
    groups: Sequence[Decoded],
) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of an adapter, float32, one at a time, by path.

    Args:    shapes: of all tensors, in the order in which they are yielded.
             initial: the values of every lora_A as drawn; lora_B starts at zero.
             bases: the directions of every pair, lora_A float32[n, in] and lora_B float32[out, n], of which
             the layout may use the first only.
             groups: of the layout.
    Raises:  DocumentError: the layout is of another adapter than the basis, or a number is not finite.
    """
    by_path: dict[str, list[Decoded]] = {path: [] for path in shapes}
    for one in groups:
        for path in one.group.chunks:
            if path not in by_path:
                raise DocumentError(path[:200], "a tensor of the basis", "none", _OTHER)
            by_path[path].append(one)
    for path, shape in shapes.items():
        with np.errstate(over="ignore", invalid="ignore"):
            tensor = _tensor(path, shape, by_path[path], bases)
            if path in initial:
                n_kept = _n_kept(path, shape, [one.group for one in by_path[path]])
                if n_kept:
                    tensor[:n_kept] += initial[path][:n_kept]
        if not np.all(np.isfinite(tensor)):
            raise DocumentError(path, "finite numbers", "NaN or infinity", "train again with a lower rate")
        yield path, tensor


_OTHER = "the layout is of another basis"


def _n_kept(path: str, shape: Shape, groups: Sequence[Group]) -> int:
    """Return how many rows keep their initial values: those of vectors, where the others hold a basis."""
    if all(group.axis != "spectrum" for group in groups):
        return shape.n_rows
    return sum(len(group.chunks[path]) for group in groups)


def _tensor(path: str, shape: Shape, groups: Sequence[Decoded], bases: Mapping[str, Array]) -> Array:
    """Return float32 of a tensor's shape: its blocks one after the other, and zeros behind them."""
    tensor = np.zeros(shape, np.float32)
    start = 0
    for one in groups:
        has_rows, n = _extent(path, one.group)
        stop = start + n
        place = tensor[start:stop] if has_rows else tensor[:, start:stop]
        n_across = place.shape[1 if has_rows else 0]
        fits = stop <= shape[0 if has_rows else 1]
        basis = bases[path] if one.group.axis == "spectrum" else None
        if basis is None:
            fits = fits and n_across == one.group.chunk_size
        elif fits:
            fits = basis.shape[1 if has_rows else 0] == n_across and n <= basis.shape[0 if has_rows else 1]
        if not fits:
            expected = f"chunks that fit {list(shape)}"
            raise DocumentError(path, expected, f"{n} of {one.group.chunk_size} numbers", _OTHER)
        _fill(place, path, one, basis, n)
        start = stop
    return tensor


def _extent(path: str, group: Group) -> tuple[bool, int]:
    """Return whether a group fills rows of a tensor, and not columns, and how many."""
    if group.axis == "spectrum":
        return not group.chunks[path], group.n_directions[path]
    return group.axis == "row", len(group.chunks[path])


def _fill(place: Array, path: str, one: Decoded, basis: Array | None, n: int) -> None:
    if basis is None:
        chunks = one.chunks(path)
        place[...] = chunks if one.group.axis == "row" else chunks.T
    elif not one.group.chunks[path]:
        place[...] = basis[:n]
    else:
        np.multiply(basis[:, :n], one.chunks(path).reshape(-1), out=place)
