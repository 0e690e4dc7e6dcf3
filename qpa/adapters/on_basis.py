"""The basis that an adapter shares with others: what its plan takes from there, and its directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpa.adapters.kind import PlannedAdapter, Request, check_as_before, completed
from qpa.documents import AdapterSpec, BaseModelReference, BasisReference
from qpa.errors import DocumentError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from qpa.serve.basis import Basis


@dataclass(frozen=True)
class PlannedBasis:
    """A basis, and the plan of the adapters on it.

    Args:    basis: whose files have been checked.
             spec: of its adapters.
    """

    basis: Basis
    spec: AdapterSpec

    @classmethod
    def read(cls, directory: Path) -> PlannedBasis:
        """Read a basis.

        Raises:  DocumentError: it is missing or damaged.
        """
        from qpa.serve.basis import Basis

        basis = Basis.open(directory)
        path = directory / AdapterSpec.file_name()
        if not path.is_file():
            advice = "copy the basis again, with its plan"
            raise DocumentError(str(path), "the plan of the basis's adapters", "none", advice)
        spec = AdapterSpec.from_json(path.read_bytes(), str(path))
        shapes = {tensor.path: tensor.shape for tensor in spec.tensors}
        if shapes != dict(basis.shapes) or spec.base.name_or_path != basis.base:
            raise DocumentError(
                str(path), "the plan of the basis beside it", "another", "copy the basis again"
            )
        return cls(basis, spec)

    @property
    def reference(self) -> BasisReference:
        """Return what a plan says of the basis."""
        return BasisReference(
            directory=str(self.basis.directory),
            digest=self.basis.digest.hex(),
            base=self.spec.base.name_or_path,
            revision=self.spec.base.revision,
        )

    def completed(self, asked: Request) -> Request:
        """Return a request with what was asked for the basis where nothing is asked now."""
        return completed(asked, self.spec)

    def check(self, base: BaseModelReference, method: str, planned: PlannedAdapter) -> None:
        """Check that a plan has the basis's base model, kind, scale and tensors.

        Raises:  OptionError: it has others.
        """
        whose, advice = "the basis", "leave it out"
        words = f"the base model of {whose}"
        check_as_before(self.spec, base, method, planned, whose=whose, base_words=words, advice=advice)
        if planned.tensors != self.spec.tensors:
            raise OptionError("targets", f"the layers of {whose}", "others", advice)


def basis_of(spec: AdapterSpec, moved_to: str | None) -> Basis | None:
    """Return the basis of a plan, with its files checked; None where it has none.

    Args:    moved_to: where it is now, if it is no longer where it was.
    Raises:  OptionError: a place is given, and the plan has no basis.
             DocumentError: it is missing or damaged, or another one is there.
    """
    from qpa.serve.basis import Basis

    if spec.basis is None:
        if moved_to is not None:
            raise OptionError("basis", "none, since the plan has no basis", moved_to, "leave it out")
        return None
    place = Path(moved_to or spec.basis.directory)
    try:
        basis = Basis.open(place)
    except DocumentError as error:
        raise error if moved_to else error.with_advice("say where it is now: `basis`") from error
    if basis.digest.hex() != spec.basis.digest:
        expected = f"the basis {spec.basis.digest[:12]}.., with which it was planned"
        raise DocumentError(str(place), expected, f"{basis.digest.hex()[:12]}..", "say where it is: `basis`")
    return basis


def directions(basis: Basis, bank: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return the first directions of every tensor in a bank, as many as a shape has, by path."""
    import torch

    with basis.reading(bank) as reading:
        return {
            path: torch.from_numpy(reading.bases[path][:n_rows, :n_columns].copy())
            for path, (n_rows, n_columns) in shapes.items()
        }
