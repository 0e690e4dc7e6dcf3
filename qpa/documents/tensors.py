"""How documents name the tensors of an adapter."""

from __future__ import annotations

from qpa.documents.base import Record


class TensorShape(Record):
    """An adapter tensor by its path in the AdapterSpec, and its shape."""

    path: str
    shape: tuple[int, int]

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the tensor has."""
        return self.shape[0] * self.shape[1]
