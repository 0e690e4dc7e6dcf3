"""What an adapter makes of a weight of the base model.

    row_scale row_turn (W + left right) column_turn column_scale

A Conv1D and an embedding store W as [in, out], and so their change is transposed. Each kind says in its own
file which change it makes; alpha / rank is in one of the factors already (`qpa.adapters.frozen_arrays`).

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from qpa.errors import ExportError
from qpa.store.tensor_file import Array

Blocks = Callable[[], Iterable[tuple[slice, Array]]]
"""A function that gives the stored weight in blocks of rows, each with the slice of its rows."""


@dataclass(frozen=True)
class WeightChange:
    """The change of one stored weight of shape [n_rows, n_columns].

    Args:    left, right: float32[n_rows, rank] and float32[rank, n_columns], whose product is added.
             row_turn, column_turn: float32[n_blocks, size, size], the blocks on the diagonal of a matrix that
             the rows, or the columns, are multiplied by; one block stands for as many as the side has.
             row_scale, column_scale: float32[n_rows, 1] and float32[1, n_columns] or [n_columns].
    """

    left: Array | None = None
    right: Array | None = None
    row_turn: Array | None = None
    column_turn: Array | None = None
    row_scale: Array | None = None
    column_scale: Array | None = None

    @property
    def n_rows_together(self) -> int:
        """Return how many neighbouring rows change together; a slice of rows is to hold a multiple of it."""
        return 1 if self.row_turn is None else self.row_turn.shape[1]

    def apply(self, name: str, rows: slice, numbers: Array) -> Array:
        """Return float32 rows of the changed weight for the same rows of the base's.

        Raises:  ExportError: they are not finite; `name` is the subject.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            changed = self._turned(rows, self.summed(rows, numbers))
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

    def _turned(self, rows: slice, numbers: Array) -> Array:
        """Return float32 rows of the sum, multiplied by the blocks on both sides."""
        if self.row_turn is not None:
            n, size, _ = self.row_turn.shape
            blocks = slice(None) if n == 1 else slice(*(row // size for row in rows.indices(n * size)[:2]))
            cut = numbers.reshape(-1, size, numbers.shape[1])
            numbers = (self.row_turn[blocks] @ cut).reshape(numbers.shape)
        if self.column_turn is not None:
            cut = numbers.reshape(len(numbers), -1, self.column_turn.shape[1]).swapaxes(0, 1)
            numbers = (cut @ self.column_turn).swapaxes(0, 1).reshape(numbers.shape)
        return numbers
