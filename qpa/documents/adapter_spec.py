"""AdapterSpec: every tensor of the adapter, before anything is decided about how to generate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.base import Document, JsonObject, Record

Method = Literal["lora", "dora", "ia3", "prefix", "ffa"]
Role = Literal[
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "ia3_l",
    "prefix_key",
    "prefix_value",
    "ffa_down",
    "ffa_up",
]
InitialValue = Literal["kaiming_uniform", "uniform", "zeros", "ones", "base"]
Axis = Literal["row", "column"]

METHOD_NAMES: dict[Method, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "prefix": "prefix tuning",
    "ffa": "feed-forward adapter",
}
"""What people call the kinds of adapters."""

ROLES_OF: dict[Method, tuple[Role, ...]] = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "ia3": ("ia3_l",),
    "prefix": ("prefix_key", "prefix_value"),
    "ffa": ("ffa_down", "ffa_up"),
}
"""The tensors of one module, in order."""

EMBEDDING_ROLES: tuple[Role, ...] = ("lora_embedding_A", "lora_embedding_B")
"""Those of LoRA on an embedding, instead."""

_IN_ROWS: tuple[Role, ...] = ("lora_A", "lora_embedding_A", "ffa_down", "prefix_key", "prefix_value")
_WITH_WEIGHT: tuple[Role, ...] = ("lora_A", "lora_B", "ffa_down", "ffa_up")


class BaseModelReference(Record):
    """The base model an adapter belongs to.

    Args:    name_or_path: local directory or Hub id, as the user gave it.
             local: it was a local directory, which is never looked for on the Hub.
             revision: Hub revision; None for a local directory or the default branch.
             config_digest: digest of what the model's config.json says, see `qpa.models.base_model`.
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

    Args:    module: path of the adapted module in the base model; of a prefix "layers.<n>".
             module_type: last component of that path, "q_proj"; of a prefix "layers".
             role: lora_A or ffa_down [rank, in_features]; lora_B or ffa_up [out_features, rank];
             lora_embedding_A [rank, n_vocabulary] and lora_embedding_B [hidden, rank];
             lora_magnitude_vector [out_features, 1]; ia3_l [out_features, 1] that scales what a module
             returns, or [1, in_features] that scales what it gets; prefix_key or prefix_value
             [n_virtual_tokens, n_key_value_heads * head_size].
             initial: rule for its value before training; "base": read from the base model, see
             `qpa.adapters.attach`.
    """

    module: str
    module_type: str
    role: Role
    shape: tuple[int, int]
    initial: InitialValue

    @property
    def path(self) -> str:
        """Return the tensor's name inside the base model, "model.layers.0.mlp.up_proj.lora_A.weight"."""
        return f"{self.module}.{self.role}" + (".weight" if self.role in _WITH_WEIGHT else "")

    @property
    def axis(self) -> Axis:
        """Return whether the vectors it consists of are its rows or its columns."""
        return "row" if _is_in_rows(self.role, self.shape) else "column"

    @property
    def n_vectors(self) -> int:
        """Return how many vectors it consists of."""
        return self.shape[0 if self.axis == "row" else 1]

    @property
    def vector_length(self) -> int:
        """Return how many numbers each of them has."""
        return self.shape[1 if self.axis == "row" else 0]

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the tensor has."""
        return self.shape[0] * self.shape[1]


def _layer(module: str) -> str:
    """Return a path up to its first number, "model.layers.0", which all experts of a layer share."""
    parts = module.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: first + 1])


def module_of(path: str) -> str:
    """Return the module of an `AdapterTensor.path`."""
    return path.removesuffix(".weight").rpartition(".")[0]


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew LoRA only, and said so in the same words."""
    return content


class AdapterSpec(Document):
    """What an adapter consists of.

    Invariants: every module has the tensors of its method, in order, and of one rank, or of LoRA those of
    an embedding; no module occurs twice; LoRA's rank is at most min(in, out).

    Args:    rank: of LoRA and DoRA; hidden width of a feed-forward adapter; virtual tokens of a prefix;
             1 for IA3.
             alpha: delta W is alpha / rank times B A; equal to rank where there is no such product.
             target_modules: shortest list of names that selects exactly the adapted modules in PEFT; none
             for a prefix.
             fan_in_fan_out: the adapted modules are transformers' Conv1D (weight [in, out]).
    """

    kind: ClassVar[str] = "adapter-spec"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (_upgrade_1,)

    base: BaseModelReference
    method: Method
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    fan_in_fan_out: bool
    tensors: tuple[AdapterTensor, ...]

    @property
    def n_numbers(self) -> int:
        """Return m, the number of trainable numbers the adapter itself would have."""
        return sum(tensor.n_numbers for tensor in self.tensors)

    @property
    def pairs(self) -> tuple[tuple[AdapterTensor, AdapterTensor], ...]:
        """Return (lora_A, lora_B) of every module; none where the method has no such product."""
        if self.method not in ("lora", "dora"):
            return ()
        n_roles = len(ROLES_OF[self.method])
        return tuple(zip(self.tensors[::n_roles], self.tensors[1::n_roles], strict=True))

    @property
    def n_layers(self) -> int:
        """Return in how many layers of the model the most common type of module is."""
        layers: dict[str, set[str]] = {}
        for tensor in self.tensors:
            layers.setdefault(tensor.module_type, set()).add(_layer(tensor.module))
        return max(map(len, layers.values()))

    @model_validator(mode="after")
    def _verify(self) -> Self:
        check_tensors(self.method, self.rank, [(t.module, t.role, t.shape) for t in self.tensors])
        return self


def check_tensors(method: Method, rank: int, tensors: Sequence[tuple[str, str, tuple[int, int]]]) -> None:
    """Check that tensors, given as (module, role, shape), are those of an adapter.

    Raises:  ValueError: a role is missing, in another place, or there twice; or a shape is not of this rank.
    """
    n_roles = len(ROLES_OF[method])
    if not tensors or len(tensors) % n_roles:
        raise ValueError(f"tensors must be {' and '.join(ROLES_OF[method])} of each module")
    if len({(module, role) for module, role, _ in tensors}) != len(tensors):
        raise ValueError("tensor paths must be unique")
    for first in range(0, len(tensors), n_roles):
        _check_module(method, rank, tensors[first : first + n_roles])


def _check_module(method: Method, rank: int, tensors: Sequence[tuple[str, str, tuple[int, int]]]) -> None:
    module, found = tensors[0][0], tuple(role for _, role, _ in tensors)
    roles_fit = found == ROLES_OF[method] or (method == "lora" and found == EMBEDDING_ROLES)
    if not roles_fit or any(name != module for name, _, _ in tensors):
        order = " must be followed by ".join(ROLES_OF[method])
        raise ValueError(f"{module}: {order} of the same module")
    shapes = {role: shape for _, role, shape in tensors}
    for role, shape in shapes.items():
        n_vectors = 1 if role == "lora_magnitude_vector" else rank
        if _n_vectors(role, shape) != n_vectors or min(shape) < 1:
            raise ValueError(f"{module}.{role}: shape {shape} does not have rank {n_vectors}")
    n_outputs = {shape[0] for role, shape in shapes.items() if role in ("lora_B", "lora_magnitude_vector")}
    widths = {shape[1 if role == "ffa_down" else 0] for role, shape in shapes.items() if method == "ffa"}
    prefixes = {shape[1] for shape in shapes.values() if method == "prefix"}
    if max(len(n_outputs), len(widths), len(prefixes)) > 1:
        raise ValueError(f"{module}: shapes {[*shapes.values()]} are of several modules")
    sides = [shape[1 if _is_in_rows(role) else 0] for role, shape in shapes.items()]
    if method in ("lora", "dora") and rank > min(sides):
        raise ValueError(f"{module}: rank {rank} is not within 1 and min(in, out)")


def _is_in_rows(role: str, shape: tuple[int, int] = (0, 0)) -> bool:
    return role in _IN_ROWS or (role == "ia3_l" and shape[0] == 1)


def _n_vectors(role: str, shape: tuple[int, int]) -> int:
    return shape[0 if _is_in_rows(role, shape) else 1]
