"""SharedBasis: the directions of a base model, read once and shared by many adapters."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.adapter_spec import BaseModelReference
from qpa.documents.base import Attachment, Document, Record


class BasisTensor(Record):
    """A tensor of an adapter on a basis.

    Args:    path: as in the AdapterSpec.
             key: its name in adapter_model.safetensors.
             factor: "A" of a lora_A, which starts as drawn, and "B" of a lora_B, which starts at zero.
             shape: [rank, in] or [out, rank].
    """

    path: str
    key: str
    factor: Literal["A", "B"]
    shape: tuple[int, int]


class Calibration(Record):
    """What directions were read from.

    Args:    data_digest: of the tokenised training and evaluation splits.
             n_batches, batch_size: how many rows of the training split were read.
    """

    data_digest: str
    n_batches: int
    batch_size: int


class SharedBasis(Document):
    """The basis of a base model, for adapters of one shape.

    Invariants: every tensor has a path and a key of its own; the scale is a number above 0.

    Args:    calibration: what the directions were read from.
             scale: what lora_B is multiplied by, alpha / rank.
             lora_config: the text of adapter_config.json.
             tensors: of the adapter, in the order of its AdapterSpec.
             arrays: a safetensors file of float32; by the path of each tensor its directions, all of them,
             and by "initial." and the path of each lora_A its values as drawn.
    """

    kind: ClassVar[str] = "basis"

    base: BaseModelReference
    calibration: Calibration
    scale: float
    lora_config: str
    tensors: tuple[BasisTensor, ...]
    arrays: Attachment

    @model_validator(mode="after")
    def _verify(self) -> Self:
        n = len(self.tensors)
        if not n or len({one.path for one in self.tensors}) < n or len({one.key for one in self.tensors}) < n:
            raise ValueError("tensors have paths and keys of their own")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"{self.scale} is no scale above 0")
        if self.calibration.n_batches < 1 or self.calibration.batch_size < 1:
            raise ValueError("directions are read from at least one row")
        return self
