"""What an adapter makes of a weight of the base model: row_scale (W + left right) column_scale.

Rules:
1. LoRA: W + B A, with alpha / rank in B already (`qpa.adapters.frozen_arrays`).
2. DoRA: each output's row of W + B A is brought to the length lora_magnitude_vector (arXiv 2402.09353).
3. IA3: W times ia3_l of its outputs, and so the bias, or of its inputs (arXiv 2205.05638).
4. A Conv1D stores W as [in, out], and so does an embedding, of whose input one number is 1: the same,
   transposed.

Source: the papers; ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.errors import ExportError
from qpa.store.tensor_file import Array

Blocks = Callable[[], Iterable[tuple[slice, Array]]]
"""Gives the stored weight in blocks of rows, each with the place of its rows."""


@dataclass(frozen=True)
class WeightChange:
    """The change of one stored weight of shape [n_rows, n_columns].

    Args:    left, right: float32[n_rows, rank] and float32[rank, n_columns], whose product is added.
             row_scale, column_scale: float32[n_rows, 1] and float32[1, n_columns] or [n_columns].
    """

    left: Array | None = None
    right: Array | None = None
    row_scale: Array | None = None
    column_scale: Array | None = None

    def apply(self, name: str, rows: slice, numbers: Array) -> Array:
        """Return float32 rows of the changed weight for the same rows of the base's.

        Raises:  ExportError: they are not finite; `name` is the subject.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            changed = self.summed(rows, numbers)
            if self.row_scale is not None:
                changed *= self.row_scale[rows]
            if self.column_scale is not None:
                changed *= self.column_scale
        if not np.all(np.isfinite(changed)):
            raise ExportError(name, "finite numbers after merging", "NaN or infinity")
        return changed

    def summed(self, rows: slice, numbers: Array) -> Array:
        """Return float32 rows of the sum alone, not scaled."""
        if self.left is None or self.right is None:
            return numbers.astype(np.float32)
        changed: Array = self.left[rows] @ self.right
        changed += numbers.astype(np.float32, copy=False)
        return changed


def weight_change(arrays: FrozenArrays, module: str, blocks: Blocks, *, transposed: bool) -> WeightChange:
    """Return what the adapter makes of a module's weight.

    Args:    blocks: of the base's weight; DoRA reads them once.
             transposed: it is stored as [in, out].
    Raises:  ExportError: the arrays are not finite.
    """
    if arrays.frozen.method == "ia3":
        scale = arrays.read(f"{module}.ia3_l")
        if _scales_input(scale) == transposed:
            return WeightChange(row_scale=scale.reshape(-1, 1))
        return WeightChange(column_scale=scale.reshape(1, -1))
    a, b = arrays.factors(module)
    change = WeightChange(a.T, b.T) if transposed else WeightChange(b, a)
    if arrays.frozen.method != "dora":
        return change
    magnitude = arrays.read(f"{module}.lora_magnitude_vector")
    lengths = _lengths(change, blocks, transposed=transposed)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = (magnitude.ravel() / lengths).astype(np.float32)
    if transposed:
        return WeightChange(change.left, change.right, column_scale=scale[None])
    return WeightChange(change.left, change.right, row_scale=scale[:, None])


def bias_scale(arrays: FrozenArrays, module: str) -> Array | None:
    """Return float32[out], what the adapter multiplies a module's bias with, or None where it leaves it."""
    if arrays.frozen.method != "ia3":
        return None
    scale = arrays.read(f"{module}.ia3_l")
    return None if _scales_input(scale) else scale.ravel()


def _scales_input(scale: Array) -> bool:
    return len(scale) == 1


def _lengths(change: WeightChange, blocks: Blocks, *, transposed: bool) -> Array:
    """Return float64[out], the length of every output's row of the sum."""
    squares = []
    for rows, numbers in blocks():
        changed = change.summed(rows, numbers).astype(np.float64)
        squares.append(np.sum(changed * changed, axis=0 if transposed else 1))
    lengths: Array = np.sqrt(np.sum(squares, axis=0) if transposed else np.concatenate(squares))
    return lengths
