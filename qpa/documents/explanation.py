"""Explanation: what each part of a trained generator contributes to the loss, and where its state points."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Document, Record

SUM_TOLERANCE = 1e-4


class Contribution(Record):
    """By how much the loss is higher without a part than as trained, in the unit of the objective's loss.

    Above 0 the part lowers the loss. 0 says that the model does as well without it, and below 0 that it does
    better.

    Args:    value: on the evaluation split.
             low, high: an interval of 95 %, see `qpa.explanation.contributions`.
    """

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} is not between {self.low} and {self.high}")
        return self


class ExplainedPart(Record):
    """One part of a generator, or of the adapter that it generates.

    Args:    kind: parts of one kind stand together, such as "qubit".
             name: what the part is, such as "q3 (layer)".
             ablation: with its value at the start, its mean, or zero in its place; None where that was not
             asked.
             permutation: with its own values in another order, the mean over several orders; None likewise.
    """

    kind: str
    name: str
    ablation: Contribution | None
    permutation: Contribution | None


class PlaceShare(Record):
    """What of a state belongs to one module type in one layer.

    Args:    layer: its number; None for a module outside of layers.
             module_type: such as "q_proj"; for vectors the name of their group.
             probability: its share of the probability; None for a control without circuits.
             squared: its share of all squared coefficients; None for vectors, which are not of unit length.
    """

    layer: int | None
    module_type: str
    probability: float | None
    squared: float | None


class DirectionShare(Record):
    """What of a state belongs to one direction, over all modules.

    Args:    number: 1 for the direction in which the loss falls most steeply.
             probability, squared: see `PlaceShare`.
    """

    number: int
    probability: float | None
    squared: float


class Explanation(Document):
    """The result of explain-generator.

    Args:    n_rows, n_tokens: the rows of the evaluation split that were scored, and their tokens with a
             loss; for preferences, pairs.
             n_evaluations: how often all of them were scored.
             base_loss, trained_loss: of these rows, with the adapter as it started and as it was frozen.
             gain: the first less the second: what all parts contribute together.
             parts: kind by kind.
             places, directions: where the probability of a generator of one state went; () for others.
             unused: the probability of basis states to which nothing belongs; None where there is none.
    """

    kind: ClassVar[str] = "explanation"

    n_rows: int
    n_tokens: int
    n_evaluations: int
    base_loss: float
    trained_loss: float
    gain: Contribution
    parts: tuple[ExplainedPart, ...]
    places: tuple[PlaceShare, ...]
    directions: tuple[DirectionShare, ...]
    unused: float | None

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if min(self.n_rows, self.n_tokens, self.n_evaluations) < 1:
            raise ValueError("at least one row is scored at least once")
        names = [(part.kind, part.name) for part in self.parts]
        if len(set(names)) != len(names):
            raise ValueError("a part is explained once")
        if (self.unused is not None) != any(place.probability is not None for place in self.places):
            raise ValueError("places and unused states have probabilities, or neither")
        if self.unused is not None:
            total = self.unused + sum(place.probability or 0.0 for place in self.places)
            if abs(total - 1.0) > SUM_TOLERANCE:
                raise ValueError(f"the probabilities of all places add up to {total}")
        return self
