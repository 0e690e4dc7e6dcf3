"""Passes, and how they are composed.

Rules the pipeline enforces:
1. A pass consumes what the pass before it produces, and requires only documents made earlier. Checked
   when the pipeline is composed.
2. A document is verified again after every pass, by writing and reading it.
3. Randomness comes only from the context's seed, split by the pass's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qpa.documents.base import Document
from qpa.errors import DocumentError, PipelineError
from qpa.pipeline.pass_protocol import Pass, PassContext


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
