"""Passes, what they may see, and how they are composed.

Rules the pipeline enforces:
1. A pass consumes what the pass before it produces, and requires only documents made earlier. Checked
   when the pipeline is composed.
2. A document is verified again after every pass, by writing and reading it.
3. Randomness comes only from the context's seed, split by the pass's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from qpa import __version__
from qpa.documents.base import Attachment, Document, OptionValue, PassOption, Provenance
from qpa.errors import DocumentError, PipelineError

D = TypeVar("D", bound=Document)
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and how many there are."""


class FileStore(Protocol):
    """Where passes leave files that are too large, or not made, for JSON."""

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


def _silent(description: str, n_done: int, n_total: int) -> None:
    """Report progress to nobody."""


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
    progress: Progress = field(default=_silent, compare=False)

    def document(self, kind: type[D]) -> D:
        """Return the newest document of a type.

        Raises:  PipelineError: there is none.
        """
        for document in reversed(self.documents):
            if isinstance(document, kind):
                return document
        raise PipelineError(kind.kind, "a document made by an earlier pass", "none")

    def seed_for(self, name: str) -> int:
        """Return a 63-bit seed that depends on the context's seed and a name only."""
        return split_seed(self.seed, name)

    def provenance(self, made_by: Maker, source: Document | None) -> Provenance:
        """Return the provenance of a document that `made_by` makes from `source`."""
        options = tuple(
            PassOption(name=option.name, value=_plain(getattr(made_by, option.name)))
            for option in fields(made_by)
            if option.metadata.get("provenance", True)
        )
        return Provenance(
            pass_name=made_by.name,
            options=options,
            seed=self.seed,
            qpa_version=__version__,
            parent=source.digest if source is not None else None,
        )


class Maker(Protocol):
    """A frozen dataclass whose fields are its options: a pass or an exporter.

    A field with metadata {"provenance": False} cannot change the result and is left out of provenance.
    Class attributes: `name` is kebab-case.
    """

    name: ClassVar[str]
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


class Pipeline:
    """A checked sequence of passes.

    Args:    passes: in the order they run.
             given: types of the documents that are there before the first pass.
    Raises:  PipelineError: a pass consumes or requires what no pass before it produces.
    """

    def __init__(self, *passes: Pass, given: tuple[type[Document], ...] = ()) -> None:
        self.passes = passes
        source: type = given[-1] if given else type(None)
        available = set(given)
        for index, step in enumerate(passes):
            before = ", ".join(earlier.name for earlier in passes[:index]) or "nothing"
            if step.consumes is not source:
                raise PipelineError(
                    step.name,
                    f"a {step.consumes.__name__} from the pass before",
                    f"{source.__name__} (after {before})",
                )
            for needed in step.requires:
                if needed not in available:
                    raise PipelineError(
                        step.name, f"a {needed.__name__} made earlier", f"none (after {before})"
                    )
            source = step.produces
            available.add(step.produces)

    def run(
        self, source: Document | None, context: PassContext, keep: Callable[[Document], None] = lambda _: None
    ) -> PassContext:
        """Run all passes; return the context with their documents added.

        Args:    source: what the first pass consumes.
                 keep: called with every document as soon as it is verified.
        """
        for index, step in enumerate(self.passes):
            context.progress(step.name, index, len(self.passes))
            document = step.run(source, context)
            if not isinstance(document, step.produces):
                raise PipelineError(step.name, f"a {step.produces.__name__}", type(document).__name__)
            verify(document, step.name)
            keep(document)
            context = replace(context, documents=(*context.documents, document))
            source = document
        return context


def verify(document: Document, made_by: str) -> None:
    """Check that a document survives being written and read.

    Raises:  DocumentError: an invariant is broken, or the round trip changes the document.
    """
    again = type(document).from_json(document.to_json(), f"{document.kind} made by {made_by}")
    if again != document:
        raise DocumentError(
            f"{document.kind} made by {made_by}", "the same document after a round trip", "another"
        )


def split_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for one named use of a seed: the first bits of SHA-256("seed:name")."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _plain(value: object) -> OptionValue:
    if isinstance(value, tuple):
        return tuple(str(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
