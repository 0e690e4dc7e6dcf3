"""What a pass is, and what it may use besides its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from qpa import __version__
from qpa.documents.base import Attachment, Document, OptionValue, PassOption, Provenance
from qpa.errors import PipelineError
from qpa.pipeline.options import options_of
from qpa.progress import Progress, silent
from qpa.seeds import split_seed

if TYPE_CHECKING:
    from torch import Tensor

D = TypeVar("D", bound=Document)


class FileStore(Protocol):
    """The place where passes leave files that are too large for JSON, or of another format."""

    @property
    def path(self) -> Path:
        """Return the directory the files are in."""
        ...

    def put(self, name: str, content: bytes) -> Attachment:
        """Write a file whole or not at all; `{sha256}` in the name is replaced."""
        ...

    def get(self, attachment: Attachment) -> Path:
        """Return the file's path after checking its length and SHA-256."""
        ...

    def path_of(self, attachment: Attachment) -> Path:
        """Return the file's path after checking its length alone."""
        ...

    def drop_from(self, kind: type[Document]) -> None:
        """Remove a document and all that is made from it, before a long pass starts to make it anew."""
        ...


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may use besides its source.

    Args:    seed: the pipeline's seed.
             files: store for arrays and circuit files.
             documents: all documents made before, oldest first.
             progress: called now and then by passes that take longer than a second.
    """

    seed: int
    files: FileStore
    documents: tuple[Document, ...] = ()
    progress: Progress = field(default=silent, compare=False)

    def document(self, kind: type[D]) -> D:
        """Return the newest document of a type.

        Raises:  PipelineError: there is none.
        """
        return newest(self.documents, kind)

    def put_tensors(self, tensors: Mapping[str, Tensor]) -> Attachment:
        """Write contiguous tensors of the CPU to a safetensors file that is named by its digest."""
        from safetensors.torch import save

        return self.files.put("{sha256}.safetensors", save(dict(tensors), {"format": "pt"}))

    def seed_for(self, name: str) -> int:
        """Return a 63-bit seed that depends on the context's seed and a name only."""
        return split_seed(self.seed, name)

    def provenance(self, made_by: Maker, source: Document | None) -> Provenance:
        """Return the provenance of a document that `made_by` makes from `source`."""
        return Provenance(
            pass_name=made_by.name,
            options=recorded_options(made_by),
            seed=self.seed,
            qpa_version=__version__,
            parents=self._parents(made_by, source),
        )

    def _parents(self, made_by: Maker, source: Document | None) -> tuple[str, ...]:
        """Return the digests of what a document is made from, each once."""
        required = tuple(self.document(kind) for kind in made_by.requires)
        sources = required if source is None else (source, *required)
        return tuple(dict.fromkeys(document.digest for document in sources))


def recorded_options(maker: Maker) -> tuple[PassOption, ...]:
    """Return the options that documents record, in the order of the fields."""
    return tuple(
        PassOption(name=option.field, value=_plain(getattr(maker, option.field)))
        for option in options_of(type(maker))
        if option.provenance
    )


def newest(documents: Sequence[Document], kind: type[D]) -> D:
    """Return the newest document of a type, of documents that are sorted, oldest first.

    Raises:  PipelineError: there is none.
    """
    for document in reversed(documents):
        if isinstance(document, kind):
            return document
    raise PipelineError(kind.kind, "a document made by an earlier pass", "none")


class Maker(Protocol):
    """A frozen dataclass whose fields are its options (`qpa.pipeline.options`): a pass or an exporter.

    Class attributes: `name` is kebab-case; `section`, where there are options, is the part of a configuration
    file that they belong to; `requires` are documents that it reads besides its source.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type[Document], ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


class Pass(Maker, Protocol):
    """A step of a pipeline.

    Class attributes: `consumes` is the source's type (NoneType for the first
    pass); `requires` are further documents it reads from the context; `produces` is the result's type.
    """

    consumes: ClassVar[type]
    requires: ClassVar[tuple[type[Document], ...]]
    produces: ClassVar[type[Document]]

    def run(self, source: Any, context: PassContext) -> Document:
        """Lower the source. Nothing is mutated, and no document is written."""
        ...


def _plain(value: object) -> OptionValue:
    if isinstance(value, tuple):
        return tuple(str(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
