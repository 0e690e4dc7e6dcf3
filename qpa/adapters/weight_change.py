"""What an adapter makes of a weight of the base model: row_scale (W + left right) column_scale.

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
