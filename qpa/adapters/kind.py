"""What qpa asks of a kind of adapter. Everything that is known of a kind is in the one file that answers.

A kind from outside is a subclass in a file of its own; `qpa.adapters.registry.KINDS.add` makes it known.
Kinds that are on modules of the base model are subclasses of `qpa.adapters.module_kind.ModuleKind`, which
finds the modules; those that change weights are `qpa.adapters.weight_kind.WeightKind`, and `PeftWeightKind`
where they are trained as PEFT has them.

The files of kinds are read when a document names the kind, so they import torch, PEFT and transformers only
inside the functions that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from qpa.adapters.peft_directory import PeftDirectory
from qpa.documents import (
    AdapterSpec,
    AdapterTensor,
    BaseModelReference,
    FrozenAdapter,
    LeftOut,
    TensorRules,
)
from qpa.errors import OptionError
from qpa.models.linear_layers import last_component

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.parameter_view import AdapterParameter
    from qpa.store.tensor_file import Array

Rates = tuple[float, ...]
"""The learning rates that a bench tries, ascending; mostly three."""


@dataclass(frozen=True)
class Request:
    """What a user asks of an adapter; None stands for what suits the kind and the model.

    The fields are those of the same names of `qpa.passes.inspect_model.InspectModel`.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    bond_dimension: int | None = None
    circuit_layers: int | None = None
    fusion: str | None = None


def completed(asked: Request, spec: AdapterSpec) -> Request:
    """Return a request with what was asked for an earlier adapter where nothing is asked now.

    Rank and alpha are those that it has, since it may have them from yet another adapter or from a basis.
    """
    before: Mapping[str, Any] = spec.provenance.option_values | {"rank": spec.rank, "alpha": spec.alpha}
    missing = [field.name for field in fields(asked) if getattr(asked, field.name) is None]
    return replace(asked, **{name: before.get(name) for name in missing})


@dataclass(frozen=True)
class PlannedAdapter:
    """What an adapter on a model consists of; the fields are those of an `AdapterSpec`."""

    rank: int
    alpha: float
    tensors: tuple[AdapterTensor, ...]
    target_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    fan_in_fan_out: bool = False


def check_as_before(
    before: AdapterSpec | FrozenAdapter,
    base: BaseModelReference,
    method: str,
    planned: PlannedAdapter,
    *,
    whose: str,
    base_words: str,
    advice: str = "",
) -> None:
    """Check that a plan has the base model, kind and scale of what there was before.

    Args:    whose: what that is, in words: "the basis".
             base_words: the same of its base model.
             advice: what to do with an option that says something else.
    Raises:  OptionError: it has others.
    """
    if base.config_digest != before.base.config_digest:
        raise OptionError("model", f"{base_words}, {before.base.name_or_path}", base.name_or_path)
    for name, wanted, found in (
        ("method", before.method, method),
        ("rank", before.rank, planned.rank),
        ("alpha", before.alpha, planned.alpha),
    ):
        if wanted != found:
            raise OptionError(name, f"{wanted}, as of {whose}", str(found), advice)


class AdapterKind(ABC):
    """One kind of adapter.

    Class attributes:
             name: as on the command line and in documents, "ia3".
             title: what people call the kind, "IA3".
             place: where in the model an adapter that names no modules is, in words for a card.
             rules: the rules of its tensors.
             default_rank: the rank where none is asked for, or the number that a kind has in its place.
             has_rank, has_alpha, has_targets: whether the user may choose them.
             more_options: the other fields of a `Request` that the kind has, with their defaults.
             peft: what a directory of the kind in PEFT holds; None where PEFT does not have the kind, or a
             format has a contract of its own for it.
             formats: the names of the export formats that carry the kind, the plainest first.
             reason: why no other format can, as a clause; "" where the kind's title says enough.
             default_generator: the generator that suits the kind.
             rate: peak learning rate of that generator; None for the generator's own.
             direct_rates: learning rates at which a bench trains the adapter's own numbers; None where the
             bench knows the kind already, by PEFT's name.
             direct_sizes: what a bench asks for to get sizes; () stands for every rank.
             bench_variants: by name what such a method of a bench asks for, where there are several of it.
             generated_rates: learning rates at which a bench trains a generator of the adapter; None for
             those of the generator itself.
    Source:  ours.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    place: ClassVar[str] = ""
    rules: ClassVar[TensorRules]
    default_rank: ClassVar[int]
    has_rank: ClassVar[bool] = True
    has_alpha: ClassVar[bool] = False
    has_targets: ClassVar[bool] = True
    more_options: ClassVar[Mapping[str, object]] = {}
    peft: ClassVar[PeftDirectory | None] = None
    formats: ClassVar[tuple[str, ...]] = ()
    reason: ClassVar[str] = ""
    default_generator: ClassVar[str] = "aligned"
    rate: ClassVar[float | None] = None
    direct_rates: ClassVar[Rates | None] = None
    direct_sizes: ClassVar[tuple[Request, ...]] = ()
    bench_variants: ClassVar[Mapping[str, Request]] = {}
    generated_rates: ClassVar[Rates | None] = None

    @abstractmethod
    def words(self, rank: int) -> str:
        """Return the kind and its size in a few words, "LoRA rank 8"."""

    @abstractmethod
    def phrase(self, rank: int) -> str:
        """Return the kind and its size with an article, for a sentence, "a rank-8 LoRA"."""

    @abstractmethod
    def plan(self, model: Any, request: Request) -> PlannedAdapter:
        """Return the tensors of an adapter on a model.

        Args:    model: on torch's meta device.
        Raises:  OptionError: something that was asked for is out of range, or selects nothing.
                 ModelError: the kind does not fit the model.
        """

    def card_note(self, frozen: FrozenAdapter) -> str:
        """Return what the card of an export says of the kind alone, whole sentences; "" for nothing."""
        return ""

    def check(self, model: Any, spec: AdapterSpec) -> None:  # noqa: B027 - some kinds have nothing to check
        """Check that the planned adapter can be put on a model.

        Args:    model: on torch's meta device, and not used any more afterwards.
        Raises:  OptionError, ModelError: it cannot.
        """

    @abstractmethod
    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a model with a trainable adapter on it, in float32.

        Args:    model: of transformers; changed in place: its own parameters are frozen.
        Returns: a module that answers as the model does, with `config`, `get_base_model()` and the context
                 manager `disable_adapter()`: a `peft.PeftModel` or a `qpa.adapters.hooked_model.HookedModel`.
        Raises:  ModelError: the model has no place for the adapter.
        """

    @abstractmethod
    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name of the parameter of the wrapped model that is or holds a tensor.

        Args:    modules: paths of all adapted modules.
        """

    def part(self, parameter: Parameter, tensor: AdapterTensor, spec: AdapterSpec) -> AdapterParameter:
        """Return the part of a parameter that holds a tensor: the whole of it, unless a kind says otherwise.

        Raises:  ModelError: the parameter has no such part.
        """
        return parameter

    def values_of_base(self, wrapped: Any, spec: AdapterSpec) -> dict[str, Tensor]:
        """Return the initial values that the base model gives, float32, by the paths of their tensors.

        Raises:  ModelError: the base model does not give them.
        """
        return {}

    @abstractmethod
    def put_into(self, model: Any, arrays: FrozenArrays) -> None:
        """Turn a base model into the adapted one, except for a prefix, which is in no module.

        Args:    model: float32, changed in place.
        Raises:  ModelError: the model has no such module, or one of another shape.
                 ExportError: the arrays are not finite.
        """

    def prefix(self, arrays: FrozenArrays) -> Sequence[Array]:
        """Return keys and values of each layer in turn, [n_tokens, width], to stand before the text's."""
        return ()

    def n_positions(self, rank: int) -> int:
        """Return how many positions of the model's context an adapter takes before the text's own."""
        return 0

    def tensors_of(
        self,
        module: str,
        shapes: Sequence[tuple[int, int]],
        *,
        module_type: str = "",
        is_embedding: bool = False,
    ) -> tuple[AdapterTensor, ...]:
        """Return the tensors of a module.

        Args:    shapes: in the order of the kind's roles, with or without those that are optional.
                 module_type: "" stands for the last component of the module's path.
        """
        roles = self.rules.roles_of_embedding if is_embedding else self.rules.roles
        if len(shapes) < len(roles):
            roles = tuple(role for role in roles if not role.is_optional)
        return tuple(
            AdapterTensor(
                module=module,
                module_type=module_type or last_component(module),
                role=role.name,
                shape=shape,
                initial=role.initial,
            )
            for role, shape in zip(roles, shapes, strict=True)
        )
