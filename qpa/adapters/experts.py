"""Experts that transformers keeps fused: one parameter for the same layer of all experts of a block.

The adapter's documents and files name every expert's layer, `mlp.experts.3.up_proj`, as checkpoints and
serving engines do. In the model they are parts:

    experts.gate_up_proj  [n_experts, 2 * width, hidden]    gate_proj above up_proj
    experts.down_proj     [n_experts, hidden, width]

PEFT adapts each such parameter with one lora_A and one lora_B for all experts, of twice the rank for
gate_up_proj, and nests the wrapper of gate_up_proj in that of down_proj:

    lora_A  [n_experts * rank, in]     expert by expert
    lora_B  [out, rank * n_experts]    rank by rank, and for each the experts

The quarters of gate_up_proj's lora_B that would mix gate_proj and up_proj stay zero.

Source: ours; the layouts are those of PEFT 0.21 and transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qpa.documents import AdapterTensor, module_of
from qpa.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.adapters.parameter_view import ParameterView

_GATE_UP_B = ".experts.base_layer.lora_B.default.weight"
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")

_EXPERT = re.compile(
    r"(?P<block>.+\.experts)\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<layer>gate_proj|up_proj|down_proj)"
)


@dataclass(frozen=True)
class ExpertLayer:
    """A linear layer of one expert.

    Args:    block: path of the module that holds the fused parameters.
             index: of the expert.
             layer: "gate_proj", "up_proj" or "down_proj".
    """

    block: str
    index: int
    layer: str

    @property
    def is_down(self) -> bool:
        """Return whether it is the second layer of its feed-forward block."""
        return self.layer == "down_proj"

    def weight(self, model: Any) -> Tensor:
        """Return the base model's weight [out, in], a view of the fused parameter.

        Raises:  ModelError: the model has no such expert.
        """
        try:
            block = model.get_submodule(self.block)
            fused: Tensor = (block.down_proj if self.is_down else block.gate_up_proj)[self.index]
        except (AttributeError, IndexError) as error:
            path = f"{self.block}.{self.index}"
            raise ModelError(path, "an expert of the base model", "none") from error
        if self.is_down:
            return fused
        width = fused.shape[0] // 2
        return fused[width:] if self.layer == "up_proj" else fused[:width]


def expert_layer(module: str) -> ExpertLayer | None:
    """Return the layer of an expert that a path names, None for any other path."""
    match = _EXPERT.fullmatch(module)
    return ExpertLayer(match["block"], int(match["index"]), match["layer"]) if match else None


def has_experts(modules: Collection[str]) -> bool:
    """Return whether one of some modules is a layer of an expert."""
    return any(expert_layer(module) is not None for module in modules)


def needs_down(module: str) -> str | None:
    """Return the down_proj beside which alone PEFT reads a gate_proj or up_proj; None for other layers."""
    expert = expert_layer(module)
    return None if expert is None or expert.is_down else f"{expert.block}.{expert.index}.down_proj"


def expert_sides(model: Any) -> dict[str, tuple[int, int]]:
    """Return in_features and out_features of every layer of every fused expert, by path."""
    sides: dict[str, tuple[int, int]] = {}
    for path, block in model.named_modules():
        if not path.endswith(".experts") or not _is_fused(block):
            continue
        n_experts, hidden, width = block.down_proj.shape
        for index in range(n_experts):
            sides |= {f"{path}.{index}.{layer}": (hidden, width) for layer in EXPERT_LAYERS[:2]}
            sides[f"{path}.{index}.down_proj"] = (width, hidden)
    return sides


def _is_fused(block: Any) -> bool:
    from torch.nn import Parameter

    gate_up, down = (getattr(block, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Parameter) or not isinstance(down, Parameter) or down.ndim != 3:
        return False
    n_experts, hidden, width = down.shape
    return tuple(gate_up.shape) == (n_experts, 2 * width, hidden)


def parameter_name(tensor: AdapterTensor, adapted: Collection[str]) -> str | None:
    """Return PEFT's path, inside the base model, of the wrapper that holds an expert's tensor.

    Args:    adapted: all modules of the adapter: where both parameters of a block are, one wraps the other.
    Returns: "model.layers.0.mlp.experts.lora_A"; None for a tensor of no expert.
    """
    expert = expert_layer(tensor.module)
    if expert is None:
        return None
    is_inner = needs_down(tensor.module) in adapted
    return f"{expert.block}{'.base_layer' if is_inner else ''}.{tensor.role}"


def parameter_part(parameter: Parameter, tensor: AdapterTensor, rank: int) -> ParameterView:
    """Return an expert's lora_A or lora_B in PEFT's parameter for all experts."""
    from qpa.adapters.parameter_view import ParameterView

    expert = expert_layer(module_of(tensor.path))
    assert expert is not None
    n_layers = 1 if expert.is_down else 2
    place = 1 if expert.layer == "up_proj" else 0
    if tensor.role == "lora_A":
        return ParameterView(parameter, partial(_rows, expert.index * n_layers + place, rank))
    return ParameterView(parameter, partial(_columns, expert.index, n_layers, place, rank))


def trained_part(name: str, rank: int) -> Callable[[Tensor], Tensor] | None:
    """Return what keeps a parameter's gradient to the parts that are trained; None where that is all of it.

    Whoever looks at the gradient of gate_up_proj's lora_B, to clip it, is not to see what mixes its layers.
    """
    return partial(_unmixed, rank) if name.endswith(_GATE_UP_B) else None


def _unmixed(rank: int, gradient: Tensor) -> Tensor:
    n_out = gradient.shape[0] // 2
    kept = gradient.clone()
    by_expert = kept.view(gradient.shape[0], 2 * rank, -1)
    by_expert[:n_out, rank:] = 0
    by_expert[n_out:, :rank] = 0
    return kept


def _rows(place: int, rank: int, lora_a: Tensor) -> Tensor:
    return lora_a[place * rank : (place + 1) * rank]


def _columns(index: int, n_layers: int, place: int, rank: int, lora_b: Tensor) -> Tensor:
    n_out = lora_b.shape[0] // n_layers
    by_expert = lora_b.view(lora_b.shape[0], n_layers * rank, -1)
    return by_expert[place * n_out : (place + 1) * n_out, place * rank : (place + 1) * rank, index]
