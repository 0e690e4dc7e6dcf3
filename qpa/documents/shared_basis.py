"""SharedBasis: the directions of a base model, read once and shared by many adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.adapter_spec import BaseModelReference
from qpa.documents.base import Attachment, Document, JsonObject, Record

MAX_BANKS = 128
"""The most banks of a basis: a compact adapter has seven bits for the number of its own."""


class ChosenBank(Record):
    """The bank of a basis whose directions an adapter has.

    Args:    number: in the basis, from 0; name: of the bank.
             slope_share: how steeply the loss fell along these directions on the training's data before the
             first step, as a share of the slope along the data's own: 1 for these, and about 0 for random
             ones. None where the generator has no directions.
    """

    number: int
    name: str
    slope_share: float | None


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


class Bank(Record):
    """The directions that were read off one kind of text.

    Args:    name: of the text: the last part of the name of its file or dataset.
             data_digest: of its tokenised training and evaluation splits.
             n_batches, batch_size: how many rows of the training split were read.
    """

    name: str
    data_digest: str
    n_batches: int
    batch_size: int


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew one bank, which had no name."""
    bank: Any = content.pop("calibration")
    return content | {"banks": [bank | {"name": "data"}]}


class SharedBasis(Document):
    """The basis of a base model, for adapters of one shape.

    Invariants: every tensor has a path and a key of its own; the scale is a number above 0; there are 1 to
    128 banks.

    Args:    banks: the kinds of text; an adapter's directions are those of one of them.
             scale: what lora_B is multiplied by, alpha / rank.
             lora_config: the text of adapter_config.json.
             tensors: of the adapter, in the order of its AdapterSpec.
             arrays: a safetensors file of float32; by the path of each tensor its directions in the first
             bank, all of them; by "bank.1.", the number of a bank that is not the first, and the path those
             in that bank; and by "initial." and the path of each lora_A its values as drawn.
    """

    kind: ClassVar[str] = "basis"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (_upgrade_1,)

    base: BaseModelReference
    banks: tuple[Bank, ...]
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
        if not 1 <= len(self.banks) <= MAX_BANKS:
            raise ValueError(f"{len(self.banks)} banks, and not 1 to {MAX_BANKS}")
        if any(bank.n_batches < 1 or bank.batch_size < 1 for bank in self.banks):
            raise ValueError("directions are read from at least one row")
        return self
