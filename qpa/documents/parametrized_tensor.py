"""ParametrizedTensor: an adapter tensor that comes of trained numbers of its own, without chunks."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from qpa.documents.tensors import TensorShape


class ParametrizedTensor(TensorShape):
    """An adapter tensor that is a fixed function, its parametrization, of trained numbers of its own.

    Args:    kind: a name in `qpa.generators.parametrizations.kind.PARAMETRIZATIONS`, "numbers" for the
             tensor's numbers themselves.
             sizes: what else fixes the parametrization, by names of the kind's own, such as its layers or
             its bond dimension.
             replaces_initial: whether the tensor starts at zero, so that it is what its parametrization
             gives. Otherwise that is added to the tensor's initial value.
             n_angles: the trained numbers that are angles of rotations.
             n_own: all others.
    """

    kind: str
    sizes: tuple[tuple[str, int], ...]
    replaces_initial: bool
    n_angles: int
    n_own: int

    @property
    def n_parameters(self) -> int:
        """Return how many numbers are trained in it."""
        return self.n_angles + self.n_own

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if min(self.n_angles, self.n_own) < 0 or not self.n_parameters:
            raise ValueError(f"{self.path}: a parametrized tensor trains at least one number")
        if len(dict(self.sizes)) != len(self.sizes):
            raise ValueError(f"{self.path}: a size is given once")
        return self
