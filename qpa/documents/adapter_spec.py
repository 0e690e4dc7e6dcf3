"""AdapterSpec: every tensor of the adapter, before anything is decided about how to generate it."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.base import Document, Record

Role = Literal["lora_A", "lora_B"]
InitialValue = Literal["kaiming_uniform", "zeros"]


class BaseModelReference(Record):
    """The base model an adapter belongs to.

    Args:    name_or_path: local directory or Hub id, as the user gave it.
             local: it was a local directory, which is never looked for on the Hub.
             revision: Hub revision; None for a local directory or the default branch.
             config_digest: digest of what the model's config.json says, see `qpa.base_model`.
             model_type, architecture: as in the config, "llama" and "LlamaForCausalLM".
             head: module path of the output head; None where the model names none.
             ties_lm_head: the output head shares its weight with the input embedding.
             trust_remote_code: the plan was made with the model's own Python code. A record, and no
             permission to run it again.
    """

    name_or_path: str
    local: bool = False
    revision: str | None
    config_digest: str
    model_type: str
    architecture: str
    head: str | None = None
    ties_lm_head: bool
    trust_remote_code: bool


class AdapterTensor(Record):
    """One tensor of the adapter.

    Args:    module: path of the adapted module in the base model.
             module_type: last component of that path, "q_proj".
             role: lora_A [rank, in_features] or lora_B [out_features, rank].
             initial: rule for its value before training.
    """

    module: str
    module_type: str
    role: Role
    shape: tuple[int, int]
    initial: InitialValue

    @property
    def path(self) -> str:
        """Return the tensor's name inside the base model, "model.layers.0.mlp.up_proj.lora_A.weight"."""
        return f"{self.module}.{self.role}.weight"

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the tensor has."""
        return self.shape[0] * self.shape[1]


class AdapterSpec(Document):
    """What an adapter consists of.

    Invariants: every module has lora_A [rank, in] directly followed by lora_B [out, rank]; no module
    occurs twice; rank is at most min(in, out).

    Args:    target_modules: shortest list of names that selects exactly the adapted modules in PEFT.
             fan_in_fan_out: the adapted modules are transformers' Conv1D (weight [in, out]).
    """

    kind: ClassVar[str] = "adapter-spec"

    base: BaseModelReference
    method: Literal["lora"]
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    fan_in_fan_out: bool
    tensors: tuple[AdapterTensor, ...]

    @property
    def n_numbers(self) -> int:
        """Return m, the number of trainable numbers LoRA itself would have."""
        return sum(tensor.n_numbers for tensor in self.tensors)

    @property
    def pairs(self) -> tuple[tuple[AdapterTensor, AdapterTensor], ...]:
        """Return (lora_A, lora_B) of every module."""
        return tuple(zip(self.tensors[::2], self.tensors[1::2], strict=True))

    @property
    def n_layers(self) -> int:
        """Return the largest number of modules of one type: a layer each."""
        return max(Counter(a.module_type for a, _ in self.pairs).values())

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if not self.tensors or len(self.tensors) % 2:
            raise ValueError("tensors must be lora_A and lora_B in pairs")
        if len({tensor.path for tensor in self.tensors}) != len(self.tensors):
            raise ValueError("tensor paths must be unique")
        for a, b in self.pairs:
            if (a.role, b.role) != ("lora_A", "lora_B") or a.module != b.module:
                raise ValueError(f"{a.module}: lora_A must be followed by lora_B of the same module")
            if a.shape[0] != self.rank or b.shape[1] != self.rank:
                raise ValueError(f"{a.module}: shapes {a.shape}, {b.shape} do not have rank {self.rank}")
            if not 1 <= self.rank <= min(a.shape[1], b.shape[0]):
                raise ValueError(f"{a.module}: rank {self.rank} is not within 1 and min(in, out)")
        return self
