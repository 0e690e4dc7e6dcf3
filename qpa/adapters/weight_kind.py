"""Kinds of adapters on linear layers that are a change of each layer's weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from qpa.adapters.experts import fused_parameters
from qpa.adapters.module_kind import ModuleKind
from qpa.adapters.peft_check import check_in_peft
from qpa.adapters.peft_model import wrap_in_peft
from qpa.adapters.targets import check_beside_experts
from qpa.documents import AdapterSpec, FrozenAdapter
from qpa.errors import ExportError
from qpa.models.linear_layers import has_convolutions

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.weight_change import Blocks, WeightChange
    from qpa.store.tensor_file import Array


class WeightKind(ModuleKind):
    """A kind of adapter that can be merged into the weights of a checkpoint."""

    @abstractmethod
    def sides(self, arrays: FrozenArrays, module: str) -> tuple[int | None, int | None]:
        """Return out_features and in_features of an adapted module; None is one the adapter leaves open."""

    @abstractmethod
    def weight_change(
        self, arrays: FrozenArrays, module: str, blocks: Blocks, *, transposed: bool
    ) -> WeightChange:
        """Return what the adapter makes of a module's weight.

        Args:    blocks: the blocks of the base's weight, for a change that depends on it.
                 transposed: the weight is stored as [in, out].
        Raises:  ExportError: the arrays are not finite.
        """

    def bias_scale(self, arrays: FrozenArrays, module: str) -> Array | None:
        """Return float32[out], what the adapter multiplies a module's bias with; None where it leaves it."""
        return None

    def put_into(self, model: Any, arrays: FrozenArrays) -> None:
        """Change the weights of the adapted modules, see `AdapterKind.put_into`."""
        from qpa.adapters.merge_into_model import change_weights

        change_weights(model, arrays, self)


class PeftWeightKind(WeightKind):
    """A kind that is trained as PEFT has it."""

    @abstractmethod
    def peft_config(self, spec: AdapterSpec) -> Any:
        """Return PEFT's config of an adapter that is to be trained."""

    def check(self, model: Any, spec: AdapterSpec) -> None:
        """Check that PEFT makes exactly the tensors of the spec, where that is in question.

        PEFT refuses some linear layers: those of fused experts, by their names, and those of state-space
        mixers, which have convolutions. For any other model PEFT is not imported, since that takes time.
        """
        if fused_parameters(model):
            check_beside_experts(model, spec, self.candidates(model))
        elif has_convolutions(model):
            check_in_peft(model, spec)

    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a `peft.PeftModel`."""
        return wrap_in_peft(model, self.peft_config(spec), self.title)


def weight_kind(frozen: FrozenAdapter) -> WeightKind:
    """Return the kind of an adapter that is a change of weights.

    Raises:  ExportError: it is of another kind.
    """
    from qpa.adapters.registry import KINDS

    kind = KINDS[frozen.method]
    if not isinstance(kind, WeightKind):
        raise ExportError(kind.title, "an adapter that is a change of weights", "one that is not")
    return kind
