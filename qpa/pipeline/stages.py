"""The stages of a run: the documents in order, which command makes each, and what it is made from."""

from __future__ import annotations

from typing import NamedTuple

from qpa.documents import (
    AdapterSpec,
    Document,
    Explanation,
    FrozenAdapter,
    LogicalCircuit,
    Measurement,
    NativeCircuit,
    TrainedGenerator,
    WeightLayout,
)


class Stage(NamedTuple):
    """One document of a run.

    Args:    document: its type, which also names its file.
             made_by: the command that makes it.
             made_from: the document that its pass consumes; None for the first stage.
             is_optional: whether a run is whole without it.
    """

    document: type[Document]
    made_by: str
    made_from: type[Document] | None
    is_optional: bool = False


STAGES = (
    Stage(AdapterSpec, "qpa plan", None),
    Stage(WeightLayout, "qpa plan", AdapterSpec),
    Stage(LogicalCircuit, "qpa plan", WeightLayout),
    Stage(NativeCircuit, "qpa plan", LogicalCircuit),
    Stage(TrainedGenerator, "qpa train", LogicalCircuit),
    Stage(Measurement, "qpa train", TrainedGenerator),
    Stage(FrozenAdapter, "qpa train", Measurement),
    Stage(Explanation, "qpa explain", FrozenAdapter, is_optional=True),
)
"""All stages, each after the one that it is made from.

The native circuit and the trained generator are both made from the logical circuit: a run can be transpiled
for another device after training.
"""


def stage_of(document: type[Document]) -> Stage:
    """Return the stage of a document's type."""
    return next(stage for stage in STAGES if stage.document is document)


def stages_through(last: type[Document]) -> tuple[Stage, ...]:
    """Return the stages from the first to one, in order."""
    return STAGES[: STAGES.index(stage_of(last)) + 1]


def ancestors(document: type[Document]) -> tuple[type[Document], ...]:
    """Return what a document is made from, and what that is made from, the nearest first."""
    parent = stage_of(document).made_from
    return () if parent is None else (parent, *ancestors(parent))


def descendants(document: type[Document]) -> tuple[type[Document], ...]:
    """Return what is made from a document, in order: what is stale when it is written again."""
    return tuple(stage.document for stage in STAGES if document in ancestors(stage.document))
