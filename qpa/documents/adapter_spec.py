"""AdapterSpec: every tensor of the adapter, before anything is decided about how to generate it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, JsonObject, Record, unchanged, with_parents
from qpa.documents.tensors import (
    TENSOR_RULES,
    InitialValue,
    Method,
    RoleName,
    TensorRef,
    check_tensors,
)


class BaseModelReference(Record):
    """The base model an adapter belongs to.

    Args:    name_or_path: local directory or Hub id, as the user gave it.
             local: whether it was a local directory, which is never looked for on the Hub.
             revision: Hub revision; None for a local directory or the default branch.
             config_digest: digest of what the model's config.json says, see `qpa.models.base_model`.
             model_type, architecture: as in the config, "llama" and "LlamaForCausalLM".
             head: module path of the output head; None where the model names none.
             ties_lm_head: whether the output head shares its weight with the input embedding.
             trust_remote_code: whether the plan was made with the model's own Python code; this is a
             record, and no permission to run that code again.
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


class LeftOut(Record):
    """Layers that a target means, and that the adapter is not on.

    Args:    layers: their path, with a star for every number in it.
             n_layers: how many there are; a block of fused experts counts as one.
             reason: why they are left out.
    """

    layers: str
    n_layers: int
    reason: str


class ParentAdapter(Record):
    """The frozen adapter with whose weights another one starts.

    Args:    digest: of its FrozenAdapter.
             arrays: a copy of its tensors, safetensors, in the run that goes on from it.
    """

    digest: str
    arrays: Attachment


class BasisReference(Record):
    """The basis that an adapter shares with others.

    Args:    directory: where it was when the plan was made.
             digest: the SHA-256 of its basis.json, 64 hexadecimal digits.
             base, revision: how the basis names the base model, which may lie elsewhere for this plan. All
             LoRAs on the basis name it so.
    """

    directory: str
    digest: str
    base: str
    revision: str | None


class AdapterTensor(TensorRef):
    """One tensor of the adapter.

    Args:    module_type: the last component of the module's path, such as "q_proj"; "layers" for a prefix.
             initial: the rule for the tensor's value before training; "base" means that the value is read
             from the base model, see `qpa.adapters.attach`, and "parent" that it is the parent's.
    """

    module_type: str
    role: RoleName
    initial: InitialValue

    @property
    def ref(self) -> TensorRef:
        """Return what a FrozenAdapter keeps of the tensor."""
        return TensorRef(module=self.module, role=self.role, shape=self.shape)


def _layer(module: str) -> str:
    """Return a path up to its first number, "model.layers.0", which all experts of a layer share."""
    parts = module.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: first + 1])


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 had its seed in the provenance alone."""
    provenance: Any = content["provenance"]
    return with_parents(content) | {"seed": provenance["seed"]}


def _upgrade_3(content: JsonObject) -> JsonObject:
    """Version 3 knew modules as targets only, and left nothing out."""
    return content | {"target_parameters": [], "left_out": []}


def _upgrade_4(content: JsonObject) -> JsonObject:
    """Version 4 knew no adapter that starts from another one."""
    return content | {"parent": None}


def _upgrade_5(content: JsonObject) -> JsonObject:
    """Version 5 knew no basis that adapters share."""
    return content | {"basis": None}


def _upgrade_6(content: JsonObject) -> JsonObject:
    """Version 6 named the base model of an adapter on a basis as the plan did."""
    basis: Any = content["basis"]
    base: Any = content["base"]
    if basis is None:
        return content
    return content | {"basis": basis | {"base": base["name_or_path"], "revision": base["revision"]}}


class AdapterSpec(Document):
    """What an adapter consists of.

    Invariants: every module has the tensors of the adapter's kind, in order and of one rank; no module
    occurs twice; the shapes keep the rules of the kind (`qpa.documents.tensors`).

    Args:    method: the kind of adapter, by its name in `qpa.adapters.registry`.
             rank: the rank of LoRA and DoRA, the hidden width of a feed-forward adapter, or the number of
             virtual tokens of a prefix; 1 for IA3.
             alpha: the change of a weight is alpha / rank times B A; alpha equals rank where there is no
             such product.
             target_modules: shortest list of names that selects exactly the adapted modules in PEFT; none
             for a prefix.
             target_parameters: the same for modules that PEFT selects by a parameter's name: stacked experts,
             and layers beside experts that have their names.
             left_out: what the targets mean and the adapter is not on.
             fan_in_fan_out: whether the adapted modules are transformers' Conv1D (weight [in, out]).
             seed: the seed of everything that is drawn before training.
             parent: the adapter with whose weights this one starts; None where each tensor starts by the rule
             of its role.
             basis: where its directions are taken from; None where a training reads its own.
    """

    kind: ClassVar[str] = "adapter-spec"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (
        unchanged,
        _upgrade_2,
        _upgrade_3,
        _upgrade_4,
        _upgrade_5,
        _upgrade_6,
    )

    base: BaseModelReference
    method: Method
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    fan_in_fan_out: bool
    tensors: tuple[AdapterTensor, ...]
    seed: int
    parent: ParentAdapter | None
    basis: BasisReference | None

    @property
    def given(self) -> tuple[AdapterTensor, ...]:
        """Return the tensors whose first values no rule gives, but the base model or the parent."""
        return tuple(tensor for tensor in self.tensors if tensor.initial in ("base", "parent"))

    @property
    def n_numbers(self) -> int:
        """Return m, the number of trainable numbers the adapter itself would have."""
        return sum(tensor.n_numbers for tensor in self.tensors)

    @property
    def pairs(self) -> tuple[tuple[AdapterTensor, AdapterTensor], ...]:
        """Return both factors, lora_A and lora_B, of every module; () where the kind has no such product."""
        rules = TENSOR_RULES[self.method]
        if not rules.is_product:
            return ()
        n_roles = len(rules.roles)
        return tuple(zip(self.tensors[::n_roles], self.tensors[1::n_roles], strict=True))

    @property
    def n_layers(self) -> int:
        """Return the number of layers that have the most common type of adapted module."""
        layers: dict[str, set[str]] = {}
        for tensor in self.tensors:
            layers.setdefault(tensor.module_type, set()).add(_layer(tensor.module))
        return max(map(len, layers.values()))

    @model_validator(mode="after")
    def _verify(self) -> Self:
        check_tensors(self.method, self.rank, self.tensors)
        if {tensor.initial == "parent" for tensor in self.tensors} != {self.parent is not None}:
            raise ValueError("all tensors start with a parent's values, and there is one, or none does")
        return self
