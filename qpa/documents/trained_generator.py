"""TrainedGenerator: the angles and decoders after training, and the adapter that they generated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, JsonObject, Record, with_parents
from qpa.documents.data_summary import DataSummary
from qpa.documents.shared_basis import ChosenBank

MAX_EXPONENT = 709.0

INITIAL_PREFIX = "initial."
"""The start of the names of arrays that hold initial values read from the base model."""


ANGLES_ARRAY = "chunk_features.angles"
"""The name of the array of angles."""


_OF_ONE_CONTEXT = ("n_train_tokens", "n_eval_tokens", "base_loss", "eval_loss")


class Score(Record):
    """A number by which an objective judges a model, besides its loss.

    Args:    name: the name of the score, such as "accuracy".
             base, adapted: its value on the evaluation split before and after training.
    """

    name: str
    base: float
    adapted: float


class TrainingResult(Record):
    """What training did, in numbers that the same seed reproduces on the same machine.

    Args:    n_steps: the number of optimizer steps.
             n_train_tokens, n_eval_tokens: the numbers of tokens with a label in the two splits.
             base_loss, eval_loss: the objective's loss on the evaluation split before and after training.
             That of "sft" is in nats per token, weighted by real tokens: padding and masked prompts do not
             count.
             data_digest: digest of the tokenised training and evaluation splits.
             frozen_step: the number of optimizer steps after which the generator was as it is kept; less than
             `n_steps` where the best evaluation was an earlier one.
             objective: what was trained for, a name in `qpa.training.objectives.objective.OBJECTIVES`.
             scores: what the objective says besides its loss.
             quantization: what the base model's weights were rounded to in training, a name in
             `qpa.models.quantization.QUANTIZATIONS`; None where they were used as they are. The losses are
             those of this model.
    """

    n_steps: int
    n_train_tokens: int
    n_eval_tokens: int
    base_loss: float
    eval_loss: float
    data_digest: str
    frozen_step: int
    objective: str
    scores: tuple[Score, ...]
    quantization: str | None

    @property
    def has_perplexity(self) -> bool:
        """Return whether the losses are nats per token, so that their exponentials are perplexities."""
        return self.objective == "sft"


def with_whole_result(content: JsonObject) -> JsonObject:
    """Return a document's content whose result also says what older versions took for granted.

    They kept the last step of a supervised fine-tuning on a base model as it is.
    """
    result: Any = content["result"]
    more = {"frozen_step": result["n_steps"], "objective": "sft", "scores": [], "quantization": None}
    return content | {"result": result | more}


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; infinity where it overflows."""
    return math.exp(loss) if loss < MAX_EXPONENT else math.inf


def perplexity_text(loss: float) -> str:
    """Write exp(loss) of a loss in nats per token, as a power of e where it has too many digits."""
    return f"{math.exp(loss):.3f}" if loss < 50.0 else f"e^{loss:.1f}"


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew one source of probabilities and one way to pull gradients back through it."""
    return with_parents(content) | {"source": "exact", "gradient": "adjoint"}


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 knew exact simulation, or sources from outside whose shots it did not write."""
    return content | {"shots": None, "backend": None, "circuit": None, "device": None}


def _upgrade_3(content: JsonObject) -> JsonObject:
    """Version 3 did not count what the data was."""
    return content | {"data": None}


def _upgrade_5(content: JsonObject) -> JsonObject:
    """Version 5 knew no contexts."""
    return content | {"contexts": []}


def _upgrade_6(content: JsonObject) -> JsonObject:
    """Version 6 knew one bank of directions, which was the first where the plan had a basis."""
    return content | {"bank": None}


class TrainedContext(Record):
    """What the training left of one of its contexts.

    Args:    name: of the context.
             adapter, probe: as in `TrainedGenerator`, of this context.
             n_train_tokens, n_eval_tokens, base_loss, eval_loss: as in `TrainingResult`, of its data alone.
    """

    name: str
    adapter: Attachment
    probe: Attachment
    n_train_tokens: int
    n_eval_tokens: int
    base_loss: float
    eval_loss: float


class Live(NamedTuple):
    """The adapter of a live model, its probe, and what the training gained on the data that it is for."""

    adapter: Attachment
    probe: Attachment
    result: TrainingResult


class TrainedGenerator(Document):
    """The result of train-generator.

    Args:    arrays: a safetensors file with what `state_dict()` of the generator returns:
             "chunk_features.angles" float32[n_circuits, n_angles] in radians, or a control's
             "chunk_features.table" or "chunk_features.weights"; the decoders' weights; and the bases. It
             also has the initial values that the base model gave, named "initial." and the tensor's path.
             adapter: safetensors; the adapter's tensors as the training process held them, named as
             in the AdapterSpec, float32.
             probe: safetensors; what the live model answered to a fixed prompt, see `qpa.models.probe`.
             source: what ran the circuits, a name in `qpa.circuits.sources.source.SOURCES`.
             shots: the number of shots of each circuit; None for the source's own choice, which is no shots
             where the source is exact.
             backend: the backend on which the circuits ran, as it was named; None for a source without one.
             circuit, device: see `Measurement`.
             gradient: the estimator that pulled gradients back through it, a name in
             `qpa.circuits.gradients.estimator.GRADIENTS`.
             data: what was read, cut and left out; None where the objective does not say, and of older runs.
             contexts: the contexts of the layout, in its order; () where it has none. `adapter` and `probe`
             are those of the first, and the losses of the result those of all data together.
             bank: the bank of the basis whose directions were trained on; None where the plan has no basis,
             and of older runs, whose basis had one bank.
    """

    kind: ClassVar[str] = "trained-generator"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (
        _upgrade_1,
        _upgrade_2,
        _upgrade_3,
        with_whole_result,
        _upgrade_5,
        _upgrade_6,
    )

    arrays: Attachment
    adapter: Attachment
    probe: Attachment
    source: str
    shots: int | None
    backend: str | None
    circuit: Attachment | None
    device: Attachment | None
    gradient: str
    result: TrainingResult
    data: DataSummary | None
    contexts: tuple[TrainedContext, ...]
    bank: ChosenBank | None

    def live(self, context: str | None) -> Live:
        """Return what the live model was.

        Args:    context: the name of one of the contexts; None for what `adapter` and `result` are.
        """
        for one in self.contexts:
            if one.name == context:
                own = {name: getattr(one, name) for name in _OF_ONE_CONTEXT}
                return Live(one.adapter, one.probe, self.result.model_copy(update={**own, "scores": ()}))
        return Live(self.adapter, self.probe, self.result)

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if min(self.result.n_train_tokens, self.result.n_eval_tokens) < 1:
            raise ValueError("training and evaluation need at least one token each")
        return self
