"""FrozenAdapter: plain tensors, no generator needed any more."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.adapter_spec import BaseModelReference
from qpa.documents.base import Attachment, Document
from qpa.documents.trained_generator import TrainingResult
from qpa.documents.weight_layout import ParameterAccount, TensorShape


class FrozenAdapter(Document):
    """Everything an exporter needs, and nothing else of the run.

    Args:    tensors: names as in the AdapterSpec, and shapes.
             arrays: safetensors with exactly these tensors, float32, equal to the live model's bits.
             probe: what the live model answered to a fixed prompt, see `qpa.probe`.
             source: how the circuit was evaluated; "exact" is the noiseless simulator.
    """

    kind: ClassVar[str] = "frozen-adapter"

    base: BaseModelReference
    method: Literal["lora"]
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    fan_in_fan_out: bool
    tensors: tuple[TensorShape, ...]
    arrays: Attachment
    probe: Attachment
    source: Literal["exact"]
    account: ParameterAccount
    result: TrainingResult

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the paths of the adapted modules, sorted."""
        return tuple(sorted({tensor.path.rpartition(".lora_")[0] for tensor in self.tensors}))

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if sum(tensor.n_numbers for tensor in self.tensors) != self.account.n_adapter:
            raise ValueError("the tensors do not have the account's number of weights")
        if any(self.rank not in tensor.shape for tensor in self.tensors):
            raise ValueError(f"every tensor must have rank {self.rank}")
        return self
