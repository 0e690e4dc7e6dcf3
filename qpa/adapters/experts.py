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
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qpa.compat.peft_ import FUSED_GATE_UP_B, module_parameter, parameter_inside
from qpa.documents import AdapterSpec, AdapterTensor
from qpa.errors import ModelError, OptionError
from qpa.models.linear_layers import Layer, head_path, last_component, linear_layers

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.adapters.parameter_view import ParameterView

EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")

_EXPERT = re.compile(
    r"(?P<block>.+\.experts)\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<layer>gate_proj|up_proj|down_proj)"
)


@dataclass(frozen=True)
class ExpertLayer:
    """A linear layer of one expert.

    Args:    block: path of the module that holds the fused parameters.
             index: the number of the expert.
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
    """Return the down_proj without which PEFT does not read a gate_proj or up_proj; None for other layers."""
    expert = expert_layer(module)
    return None if expert is None or expert.is_down else f"{expert.block}.{expert.index}.down_proj"


def expert_layers(model: Any) -> dict[str, Layer]:
    """Return every layer of every fused expert that PEFT can adapt, by path."""
    layers: dict[str, Layer] = {}
    for path, block in model.named_modules():
        if not path.endswith(".experts") or not _is_fused(block):
            continue
        n_experts, hidden, width = block.down_proj.shape
        for index in range(n_experts):
            layers |= {f"{path}.{index}.{layer}": Layer(hidden, width) for layer in EXPERT_LAYERS[:2]}
            layers[f"{path}.{index}.down_proj"] = Layer(width, hidden)
    return layers


def fused_parameters(model: Any) -> list[str]:
    """Return the 3-D parameters [n_experts, out, in] that mixtures of experts hold instead of modules."""
    return [path for path, value in model.named_parameters() if value.ndim == 3 and "expert" in path]


def refuse_left_out(model: Any, candidates: Collection[str]) -> None:
    """Refuse to adapt all linear layers where that would leave fused experts out in silence.

    Args:    candidates: the modules that can be adapted.
    Raises:  OptionError: the model has fused experts that are not among them.
    """
    fused = fused_parameters(model)
    if not fused or has_experts(candidates):
        return
    raise OptionError(
        "`targets` all-linear",
        "a model whose layers are all linear modules",
        f"fused experts such as {fused[0]}, which would stay as they are",
        f"if that is meant, name the layers outside the experts: {_outside(model, 2)}",
    )


def check_beside_experts(model: Any, spec: AdapterSpec) -> None:
    """Check that PEFT adapts the modules of a spec on a model whose experts are fused.

    PEFT takes some names to mean the experts, even where other modules have them. It reads gate_proj and
    up_proj of experts only where down_proj is adapted too.

    Args:    model: on torch's meta device, and not used any more afterwards.
    Raises:  OptionError: PEFT does not make exactly the tensors of the spec, of names that experts have.
             ModelError: PEFT refuses another module.
    """
    from qpa.adapters.peft_check import check_in_peft

    modules, refused = {tensor.module for tensor in spec.tensors}, _refused(model, spec)
    if not {needs_down(module) for module in modules} <= {None, *modules}:
        raise refused
    try:
        check_in_peft(model, spec)
    except (ModelError, ValueError) as error:
        if not _named(spec) & {*EXPERT_LAYERS}:
            raise
        raise refused from error


def _refused(model: Any, spec: AdapterSpec) -> OptionError:
    outside = f"only layers outside the experts: {_outside(model, spec.rank)}"
    both = f"name all of {', '.join(EXPERT_LAYERS)}, or {outside}"
    some = ", ".join(spec.target_modules[:4])
    n_more = len(spec.target_modules[4:])
    return OptionError(
        "targets",
        "layers that PEFT adapts one by one, or all layers of all experts where it can",
        f"{some}{f' and {n_more} more' if n_more else ''}, of which some are of fused experts",
        f"name {outside}" if _named(spec).issuperset(EXPERT_LAYERS) else both,
    )


def _named(spec: AdapterSpec) -> set[str]:
    """Return the types of the modules that are targets."""
    return {last_component(target) for target in spec.target_modules}


def _outside(model: Any, rank: int) -> str:
    """Return the option that names every type of layer outside the experts that has room for a rank."""
    head = head_path(model)
    names = (
        last_component(path)
        for path, layer in linear_layers(model).items()
        if path != head and min(layer.n_in, layer.n_out) >= rank
    )
    return "`targets` " + ",".join(name for name in dict.fromkeys(names) if name not in EXPERT_LAYERS)


def _is_fused(block: Any) -> bool:
    from torch.nn import Parameter

    gate_up, down = (getattr(block, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Parameter) or not isinstance(down, Parameter) or down.ndim != 3:
        return False
    n_experts, hidden, width = down.shape
    return tuple(gate_up.shape) == (n_experts, 2 * width, hidden)


def parameter_name(tensor: AdapterTensor, expert: ExpertLayer, adapted: Collection[str]) -> str:
    """Return the name of the parameter of a model in PEFT that holds an expert's tensor.

    Args:    adapted: all adapted modules; where both parameters of a block are adapted, one wraps the other.
    """
    is_inner = needs_down(tensor.module) in adapted
    return module_parameter(parameter_inside(expert.block) if is_inner else expert.block, tensor.role)


def parameter_part(parameter: Parameter, role: str, expert: ExpertLayer, rank: int) -> ParameterView:
    """Return an expert's lora_A or lora_B in PEFT's parameter for all experts."""
    from qpa.adapters.parameter_view import ParameterView

    n_layers = 1 if expert.is_down else 2
    place = 1 if expert.layer == "up_proj" else 0
    if role == "lora_A":
        return ParameterView(parameter, partial(_rows, expert.index * n_layers + place, rank))
    return ParameterView(parameter, partial(_columns, expert.index, n_layers, place, rank))


def is_partly_trained(tensor: AdapterTensor) -> bool:
    """Return whether the parameter that holds a tensor has parts that are no tensors and stay zero."""
    return tensor.role == "lora_B" and expert_layer(tensor.module) is not None


def keep_unmixed(wrapped: Any, rank: int) -> None:
    """Keep the gradient of every gate_up_proj's lora_B to the parts that are trained.

    Otherwise the norm by which the whole gradient is clipped would count the quarters that mix two layers.
    """
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and name.endswith(FUSED_GATE_UP_B):
            parameter.register_hook(partial(_unmixed, rank))


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
