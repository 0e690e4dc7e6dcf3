"""What kinds with a product of two factors have in common: W + (alpha / rank) B A.

lora_A is [rank, in] and lora_B [out, rank], whatever way the base stores its weight.

Source: LoRA, arXiv 2106.09685; shapes and names as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qpa.adapters.peft_directory import common_config
from qpa.adapters.weight_kind import PeftWeightKind
from qpa.documents import AdapterSpec, FrozenAdapter
from qpa.documents.base import JsonObject
from qpa.documents.tensors import Role
from qpa.errors import OptionError
from qpa.models.linear_layers import Layer

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.weight_change import WeightChange

LORA_A = Role("lora_A", "row", "kaiming_uniform", is_weight=True)
LORA_B = Role("lora_B", "column", is_weight=True, is_scaled=True)


def check_factors(shapes: Sequence[tuple[int, int]], rank: int) -> None:
    """Check that a rank is not above a side of the weight.

    Raises:  ValueError: it is.
    """
    (_, n_in), (n_out, _) = shapes[:2]
    if rank > min(n_in, n_out):
        raise ValueError(f"rank {rank} is not within 1 and min(in, out)")


def lora_config(frozen: FrozenAdapter | AdapterSpec, rank: int, *, use_dora: bool) -> JsonObject:
    """Return the content of adapter_config.json for factors of a rank, with alpha / rank in lora_B."""
    by_parameter = {"target_parameters": sorted(frozen.target_parameters)} if frozen.target_parameters else {}
    return common_config(frozen) | {
        **by_parameter,
        "bias": "none",
        "fan_in_fan_out": frozen.fan_in_fan_out,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(frozen.target_modules),
        "use_dora": use_dora,
        "use_rslora": False,
    }


class LowRankKind(PeftWeightKind):
    """A kind with lora_A and lora_B in every module."""

    default_rank: ClassVar[int] = 32
    has_alpha: ClassVar[bool] = True
    default_generator: ClassVar[str] = "spectral"
    uses_dora: ClassVar[bool]

    def words(self, rank: int) -> str:
        """Return "LoRA rank 8"."""
        return f"{self.title} rank {rank}"

    def phrase(self, rank: int) -> str:
        """Return "a rank-8 LoRA"."""
        return f"a rank-{rank} {self.title}"

    def check_rank(self, layers: Mapping[str, Layer], rank: int | None) -> int:
        """Return the rank that was asked for; else the default, or the smallest side if that is less.

        Raises:  OptionError: the rank is above a side.
        """
        smallest, path = min((min(layer.n_in, layer.n_out), path) for path, layer in layers.items())
        if rank is not None and rank > smallest:
            raise OptionError("rank", f"at most {smallest}, the smaller side of {path}", str(rank))
        return min(self.default_rank, smallest) if rank is None else rank

    def peft_config(self, spec: AdapterSpec) -> Any:
        """Return a `peft.LoraConfig` without dropout."""
        from peft import LoraConfig

        return LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.target_modules),
            target_parameters=list(spec.target_parameters) or None,
            fan_in_fan_out=spec.fan_in_fan_out,
            lora_dropout=0.0,
            bias="none",
            use_dora=self.uses_dora,
            task_type="CAUSAL_LM",
        )

    def sides(self, arrays: FrozenArrays, module: str) -> tuple[int | None, int | None]:
        """Return out_features and in_features of an adapted module."""
        a, b, *_ = arrays.of_module(module)
        return b.shape[0], a.shape[1]


def product(arrays: FrozenArrays, module: str, *, transposed: bool) -> WeightChange:
    """Return the sum W + B A, with alpha / rank in B already, as a change of the stored weight."""
    from qpa.adapters.weight_change import WeightChange

    a, b = arrays.factors(module)
    return WeightChange(a.T, b.T) if transposed else WeightChange(b, a)
