"""Passes, and how they are composed.

Rules the pipeline enforces:
1. A pass consumes, and requires, only documents made earlier; it gets the newest of each type. This is
   checked when the pipeline is composed.
2. A document is verified again after every pass, by writing and reading it.
3. Randomness comes only from the context's seed, split by the pass's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qpa.documents.base import Document
from qpa.errors import DocumentError, PipelineError
from qpa.pipeline.options import check_options
from qpa.pipeline.pass_protocol import Pass, PassContext


class Pipeline:
    """A checked sequence of passes.

    Args:    passes: in the order they run.
             given: types of the documents that are there before the first pass.
    Raises:  PipelineError: a pass consumes or requires what no pass before it produces.
    """

    def __init__(self, *passes: Pass, given: tuple[type[Document], ...] = ()) -> None:
        self.passes = passes
        available: set[type] = {type(None), *given}
        for index, step in enumerate(passes):
            before = ", ".join(earlier.name for earlier in passes[:index]) or "nothing"
            for needed in (step.consumes, *step.requires):
                if needed not in available:
                    expected = f"a {needed.__name__} made earlier"
                    raise PipelineError(step.name, expected, f"none (after {before})")
            available.add(step.produces)

    def run(
        self, source: Document | None, context: PassContext, keep: Callable[[Document], None] = lambda _: None
    ) -> PassContext:
        """Run all passes; return the context with their documents added.

        Args:    source: a document to start from that the context does not have yet; None if it has all.
                 keep: called with every document as soon as it is verified.
        Raises:  OptionError: an option of any of the passes is out of range; no pass has run then.
        """
        for step in self.passes:
            check_options(step)
        if source is not None and source not in context.documents:
            context = replace(context, documents=(*context.documents, source))
        for index, step in enumerate(self.passes):
            context.progress(step.name, index, len(self.passes))
            is_first = step.consumes is type(None)
            document = step.run(None if is_first else context.document(step.consumes), context)
            if not isinstance(document, step.produces):
                raise PipelineError(step.name, f"a {step.produces.__name__}", type(document).__name__)
            verify(document, step.name)
            keep(document)
            context = replace(context, documents=(*context.documents, document))
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
