"""FrozenAdapter: the adapter as plain tensors, for which no generator is needed any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import model_validator

from qpa.documents.account import ParameterAccount, with_control_account, with_own_account
from qpa.documents.adapter_spec import BaseModelReference
from qpa.documents.base import Attachment, Document, JsonObject, unchanged, with_parents
from qpa.documents.tensors import TENSOR_RULES, Method, TensorRef, check_tensors
from qpa.documents.trained_generator import TrainingResult, with_whole_result


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 knew exact measurements only, and named a tensor by its path.

    A path consists of the module's path, the role, and ".weight" behind some roles.
    """
    old: list[Any] = content["tensors"]  # type: ignore[assignment]
    tensors = []
    for tensor in old:
        module, _, role = tensor.pop("path").removesuffix(".weight").rpartition(".")
        tensors.append(tensor | {"module": module, "role": role})
    return with_control_account(with_parents(content)) | {"shots": None, "tensors": tensors}


def _upgrade_3(content: JsonObject) -> JsonObject:
    """Version 3 did not say how far a frozen adapter is from the one of exact probabilities."""
    return content | {"weight_error": None, "frozen_loss": None}


def _upgrade_4(content: JsonObject) -> JsonObject:
    """Version 4 knew modules as targets only."""
    return content | {"target_parameters": []}


def _upgrade_6(content: JsonObject) -> JsonObject:
    """Version 6 did not name the generator, and knew tensors of chunks only, and no contexts."""
    return with_own_account(content) | {"generator": None, "context": None}


class FrozenAdapter(Document):
    """Everything an exporter needs, and nothing else of the run.

    Args:    tensors: the tensors of the AdapterSpec.
             arrays: a safetensors file with exactly these tensors in float32; after an exact measurement
             they are the live model's, bit for bit.
             probe: what the live model answered to a fixed prompt, see `qpa.models.probe`. Where the base was
             quantised in training, it is what the adapter on the base as it is answers.
             source: what measured the circuits, see `Measurement`; "exact" is the noiseless simulator.
             shots: the number of shots of each circuit; None where the probabilities are exact.
             weight_error: ||frozen - exact|| / ||exact - initial|| over all numbers of the adapter, where
             exact is the adapter that exact probabilities give; 0 where they were measured exactly. None
             where it is not known, or where the adapter did not move from where it started.
             frozen_loss: the loss of this adapter on the evaluation split of the training, in nats per token,
             to be compared with `result.eval_loss`; None where it was not scored.
             generator: the name of what generated the adapter; None of older runs.
             result: of the training; where there are several contexts, of this one's data.
             context: the context whose adapter this is, in words: its name, or the prompt and its text; None
             where the generator has one adapter only.
    """

    kind: ClassVar[str] = "frozen-adapter"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (
        unchanged,
        _upgrade_2,
        _upgrade_3,
        _upgrade_4,
        with_whole_result,
        _upgrade_6,
    )

    base: BaseModelReference
    method: Method
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    fan_in_fan_out: bool
    tensors: tuple[TensorRef, ...]
    arrays: Attachment
    probe: Attachment
    source: str
    shots: int | None
    weight_error: float | None
    frozen_loss: float | None
    generator: str | None
    account: ParameterAccount
    result: TrainingResult
    context: str | None

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the paths of the adapted modules, sorted."""
        return tuple(sorted({tensor.module for tensor in self.tensors}))

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Return the paths of the adapted modules that are embeddings, sorted."""
        found = {t.module for t in self.tensors if TENSOR_RULES.role(t.role).of_embedding}
        return tuple(sorted(found))

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if sum(tensor.n_numbers for tensor in self.tensors) != self.account.n_adapter:
            raise ValueError("the tensors do not have the account's number of weights")
        if self.rank < 1:
            raise ValueError("the rank must be at least 1")
        check_tensors(self.method, self.rank, self.tensors)
        return self

    @property
    def changes_tied_weight(self) -> bool:
        """Return whether the adapter is on the output head or the embedding, where both share a weight."""
        return self.base.ties_lm_head and (self.base.head in self.modules or bool(self.embeddings))
