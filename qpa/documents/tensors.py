"""How documents name the tensors of an adapter, and the rules that each kind of adapter has for its own.

The rules are data that a kind defines beside everything else that is known of it (`qpa.adapters`). Documents
look them up by the kind's name, so that a kind from outside brings its rules with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from qpa.documents.base import Record
from qpa.errors import OptionError, one_of
from qpa.registry import Registry

Axis = Literal["row", "column"]
InitialValue = Literal["kaiming_uniform", "uniform", "zeros", "ones", "base", "parent"]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Role:
    """What a tensor is in the module that it belongs to.

    Args:    name: the name of the role, such as "lora_A".
             axis: whether the vectors that the tensor consists of are its rows or its columns; None: the
             tensor is a single vector, a row or a column as its shape says.
             initial: the rule for the value before training; "base" means it is read from the base model.
             is_weight: whether the tensor is the weight of a module of this name, so that its path ends in
             ".weight".
             has_rank: whether the number of vectors is the adapter's rank; otherwise it is one, and with None
             any that the rules of the kind allow.
             is_scaled: whether the factor alpha / rank of a product is applied to this tensor.
             of_embedding: whether the module is an embedding.
             is_optional: whether an adapter of the kind may be without it, in all modules.
    """

    name: str
    axis: Axis | None
    initial: InitialValue = "zeros"
    is_weight: bool = False
    has_rank: bool | None = True
    is_scaled: bool = False
    of_embedding: bool = False
    is_optional: bool = False

    def axis_of(self, shape: Shape) -> Axis:
        """Return whether the vectors of a tensor of this shape are its rows or its columns."""
        return self.axis or ("row" if shape[0] == 1 else "column")


@dataclass(frozen=True)
class TensorRules:
    """Which tensors an adapter of one kind has in each module, and what must be true of their shapes.

    Args:    roles: the roles of a module's tensors, in order.
             roles_of_embedding: the roles of an embedding's tensors, as many; () for a kind that adapts no
             embedding.
             check: a function that raises a ValueError where the shapes of one module's tensors, in order,
             do not fit each other or the adapter's rank.
             is_product: whether alpha / rank times the product of a module's second tensor with its first
             is added to a weight.
    """

    roles: tuple[Role, ...]
    check: Callable[[Sequence[Shape], int], None]
    roles_of_embedding: tuple[Role, ...] = ()
    is_product: bool = False


class RulesRegistry(Registry[TensorRules]):
    """Find rules by the name of their kind, and roles by names that mean the same in every kind."""

    def __init__(self, option: str, built_in: Mapping[str, str]) -> None:
        super().__init__(option, built_in)
        self._roles: dict[str, Role] = {}

    def role(self, name: str) -> Role:
        """Return the role of a name.

        Raises:  ValueError: no kind has such a role.
        """
        if name not in self._roles:
            self._roles = {role.name: role for kind in self for role in _all_roles(self[kind])}
        if name not in self._roles:
            raise ValueError(f"{name[:80]} is not the role of any tensor")
        return self._roles[name]

    def add(self, name: str, thing: TensorRules) -> None:
        """Add the rules of a kind from outside.

        Raises:  OptionError: the kind's name is taken, or a role's name is taken with another meaning.
        """
        known = {role.name: role for kind in self for role in _all_roles(self[kind])}
        for role in _all_roles(thing):
            if known.get(role.name, role) != role:
                raise OptionError("role", "a name that is free", role.name, "choose another name")
        super().add(name, thing)

    def remove(self, name: str) -> None:
        """Remove the rules of a kind that `add` added."""
        super().remove(name)
        self._roles = {}


def _all_roles(rules: TensorRules) -> tuple[Role, ...]:
    return rules.roles + rules.roles_of_embedding


TENSOR_RULES = RulesRegistry(
    "method",
    {
        "lora": "qpa.adapters.lora:RULES",
        "dora": "qpa.adapters.dora:RULES",
        "ia3": "qpa.adapters.ia3:RULES",
        "prefix": "qpa.adapters.prefix:RULES",
        "ffa": "qpa.adapters.feed_forward:RULES",
        "cayley": "qpa.adapters.cayley:RULES",
        "cayley-shared": "qpa.adapters.cayley:SHARED_RULES",
        "qtha": "qpa.adapters.qtha:RULES",
    },
)


def _known(method: str) -> str:
    if method not in TENSOR_RULES:
        raise ValueError(f"{method[:80]} is not {one_of(tuple(TENSOR_RULES))}")
    return method


Method = Annotated[str, AfterValidator(_known)]
"""The name of a kind of adapter that is known."""


def _known_role(name: str) -> str:
    return TENSOR_RULES.role(name).name


RoleName = Annotated[str, AfterValidator(_known_role)]
"""The name of a role that a kind of adapter has."""


class TensorShape(Record):
    """An adapter tensor by its path in the AdapterSpec, and its shape."""

    path: str
    shape: Shape

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the tensor has."""
        return self.shape[0] * self.shape[1]


class TensorRef(Record):
    """An adapter tensor by the module that it belongs to and what it is there, and its shape.

    Args:    module: the path of the adapted module in the base model; "layers.<n>" for a prefix.
             role: the name of a `Role`, such as "lora_A".
    """

    module: str
    role: str
    shape: Shape

    @property
    def path(self) -> str:
        """Return the tensor's name inside the base model, "model.layers.0.mlp.up_proj.lora_A.weight"."""
        suffix = ".weight" if TENSOR_RULES.role(self.role).is_weight else ""
        return f"{self.module}.{self.role}{suffix}"

    @property
    def axis(self) -> Axis:
        """Return whether the vectors that the tensor consists of are its rows or its columns."""
        return TENSOR_RULES.role(self.role).axis_of(self.shape)

    @property
    def n_vectors(self) -> int:
        """Return how many vectors the tensor consists of."""
        return self.shape[0 if self.axis == "row" else 1]

    @property
    def vector_length(self) -> int:
        """Return how many numbers each of the vectors has."""
        return self.shape[1 if self.axis == "row" else 0]

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the tensor has."""
        return self.shape[0] * self.shape[1]


def check_tensors(method: str, rank: int, tensors: Sequence[TensorRef]) -> None:
    """Check that tensors are those of an adapter of a kind and of a rank.

    Raises:  ValueError: a role is missing, misplaced or there twice, or a shape does not fit.
    """
    rules = TENSOR_RULES[method]
    found = {tensor.role for tensor in tensors}
    roles = tuple(role for role in rules.roles if role.name in found or not role.is_optional)
    n_roles = len(roles)
    if not tensors or len(tensors) % n_roles:
        raise ValueError(f"tensors must be {' and '.join(_names(roles))} of each module")
    if len({(tensor.module, tensor.role) for tensor in tensors}) != len(tensors):
        raise ValueError("tensor paths must be unique")
    for first in range(0, len(tensors), n_roles):
        _check_module(rules, roles, rank, tensors[first : first + n_roles])


def _check_module(
    rules: TensorRules, roles: tuple[Role, ...], rank: int, tensors: Sequence[TensorRef]
) -> None:
    module, found = tensors[0].module, tuple(tensor.role for tensor in tensors)
    if found == _names(rules.roles_of_embedding):
        roles = rules.roles_of_embedding
    if found != _names(roles) or any(tensor.module != module for tensor in tensors):
        raise ValueError(f"{module}: {' must be followed by '.join(_names(rules.roles))} of the same module")
    for role, tensor in zip(roles, tensors, strict=True):
        n_vectors = tensor.n_vectors if role.has_rank is None else rank if role.has_rank else 1
        if tensor.n_vectors != n_vectors or min(tensor.shape) < 1:
            raise ValueError(f"{module}.{role.name}: shape {tensor.shape} does not have rank {n_vectors}")
    try:
        rules.check([tensor.shape for tensor in tensors], rank)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


def _names(roles: Iterable[Role]) -> tuple[str, ...]:
    return tuple(role.name for role in roles)
