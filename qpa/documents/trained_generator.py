"""TrainedGenerator: angles and decoder after training, and the adapter they were holding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, JsonObject, Record, with_parents

MAX_EXPONENT = 709.0

INITIAL_PREFIX = "initial."
"""Begins the names of arrays that are initial values read from the base model."""


class TrainingResult(Record):
    """What training did, in numbers that the same seed reproduces on the same machine.

    Losses are nats per token, weighted by real tokens: padding and masked prompts do not count.

    Args:    n_steps: optimizer steps.
             n_train_tokens, n_eval_tokens: tokens with a label in the two splits.
             base_loss, eval_loss: on the evaluation split before and after training.
             data_digest: digest of the tokenised training and evaluation splits.
    """

    n_steps: int
    n_train_tokens: int
    n_eval_tokens: int
    base_loss: float
    eval_loss: float
    data_digest: str


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; infinity where it overflows."""
    return math.exp(loss) if loss < MAX_EXPONENT else math.inf


def perplexity_text(loss: float) -> str:
    """Write exp(loss) of a loss in nats per token, as a power of e where it has too many digits."""
    return f"{math.exp(loss):.3f}" if loss < 50.0 else f"e^{loss:.1f}"


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew one source of probabilities and one way to pull gradients back through it."""
    return with_parents(content) | {"source": "exact", "gradient": "adjoint"}


class TrainedGenerator(Document):
    """The result of train-generator.

    Args:    arrays: safetensors; what `state_dict()` of the generator names: "chunk_features.angles"
             float32[n_circuits, n_angles] in radians, or "chunk_features.table" or "chunk_features.weights"
             of a control, the decoders' weights, the bases; and the adapter's initial values that the base
             model gave, named "initial." and their path.
             adapter: safetensors; the adapter's tensors as the training process held them, named as
             in the AdapterSpec, float32.
             probe: safetensors; what the live model answered to a fixed prompt, see `qpa.models.probe`.
             source: what ran the circuits, a name in `qpa.circuits.sources.source.SOURCES`.
             gradient: the estimator that pulled gradients back through it, a name in
             `qpa.circuits.gradients.estimator.GRADIENTS`.
    """

    kind: ClassVar[str] = "trained-generator"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (_upgrade_1,)

    arrays: Attachment
    adapter: Attachment
    probe: Attachment
    source: str
    gradient: str
    result: TrainingResult

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if min(self.result.n_train_tokens, self.result.n_eval_tokens) < 1:
            raise ValueError("training and evaluation need at least one token each")
        return self
