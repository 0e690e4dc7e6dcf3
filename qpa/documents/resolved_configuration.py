"""ResolvedConfiguration: what a run was asked for, with every default, and what it was made from."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Document, PassOption, Record


class Input(Record):
    """Something that a run reads, and what it held.

    Args:    option: the key of the option that names it, such as "train.data".
             name: the option's value.
             digest: "sha256:" and the SHA-256 of its content; of a name on the Hub "hub:" and the revision
             that was asked for, or "newest".
    """

    option: str
    name: str
    digest: str


class TrainedFrom(Record):
    """What a trained generator was made from; that it is this one is known by its digest.

    Args:    document: the digest of the `TrainedGenerator`.
             inputs: those that were read.
             n_processes: how many processes trained together; the rows of a step are those of all of them.
    """

    document: str
    inputs: tuple[Input, ...]
    n_processes: int

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if self.n_processes < 1:
            raise ValueError("at least one process trains")
        return self


class Package(Record):
    """A package that a run used, and its version."""

    name: str
    version: str


class ResolvedConfiguration(Document):
    """A configuration with the value of every option; it can be run again. No pass reads it.

    Its provenance has the seed and the version of qpa; the options are here, by their keys.

    Args:    options: of all sections, name being the key, such as "train.max_steps", sorted; None is for a
             default that follows from something else.
             formats: the formats that are exported, in order.
             inputs: the base model and the data, as they were when the run began.
             trained: what the trained generator of the run was made from; None while there is none.
             packages: what computed it, sorted by name.
    """

    kind: ClassVar[str] = "configuration"

    options: tuple[PassOption, ...]
    formats: tuple[str, ...]
    inputs: tuple[Input, ...]
    trained: TrainedFrom | None
    packages: tuple[Package, ...]

    @model_validator(mode="after")
    def _verify(self) -> Self:
        for names in ([one.name for one in self.options], [one.name for one in self.packages]):
            if names != sorted(set(names)):
                raise ValueError("options and packages must be sorted, each there once")
        if len(set(self.formats)) != len(self.formats):
            raise ValueError("a format must be there once")
        return self

    def value(self, key: str) -> object:
        """Return the value of an option; None where this qpa's configurations do not have it."""
        return next((one.value for one in self.options if one.name == key), None)
