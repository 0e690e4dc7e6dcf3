"""Experts that transformers keeps fused: one parameter for the same layer of all experts of a block.

The adapter's documents name every expert's layer by itself, as checkpoints do. In the model they are parts:

    experts.gate_up_proj  [n_experts, 2 * width, hidden]    gate_proj above up_proj
    experts.down_proj     [n_experts, hidden, width]

PEFT adapts each such parameter with one lora_A and one lora_B for all experts, and nests the wrapper of
gate_up_proj in that of down_proj:

    lora_A  [n_experts * rank, in]     expert by expert
    lora_B  [out, rank * n_experts]    rank by rank, and for each the experts

There are two forms that PEFT and a serving engine both read:
1. By expert: `mlp.experts.3.up_proj`, in Mixtral `block_sparse_moe.experts.3.w3`. PEFT knows by the type of
   the model that these names mean experts. It gives gate_up_proj twice the rank; the quarters of its lora_B
   that would mix gate_proj and up_proj stay zero.
2. Stacked, as in gpt-oss, whose parameters are [n_experts, in, out] and mix the outputs of gate and up:
   `mlp.experts.3.gate_up_proj` is one layer, and a file holds PEFT's own tensors of all experts.

Source: ours; the layouts are those of PEFT 0.21, transformers 5 and vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qpa.compat.peft_ import FUSED_GATE_UP_B, module_parameter, names_of_experts, parameter_inside
from qpa.compat.transformers_ import stores_experts_transposed
from qpa.documents import AdapterSpec, AdapterTensor, TensorRef
from qpa.models.linear_layers import Layer, last_component, linear_layers

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.adapters.parameter_view import ParameterView

GATE_UP, DOWN = "gate_up_proj", "down_proj"

_HALVES = {"gate_proj": 0, "up_proj": 1, "w1": 0, "w3": 1}
"""The layers that are one half of gate_up_proj, with the half."""

_DOWN_LAYERS = (DOWN, "w2")
_LAYERS = (*_HALVES, GATE_UP, *_DOWN_LAYERS)
_EXPERT = re.compile(
    rf"(?P<path>.+\.experts)\.(?P<index>0|[1-9][0-9]{{0,5}})\.(?P<layer>{'|'.join(_LAYERS)})"
)

_IN_MODEL, _IN_CHECKPOINT = ".mlp.experts", ".block_sparse_moe.experts"
"""The end of the path of Mixtral's experts, in the model and in its checkpoints."""


@dataclass(frozen=True)
class ExpertLayer:
    """A linear layer of one expert.

    Args:    path: where checkpoints have the experts.
             index: the number of the expert.
             layer: its name, such as "up_proj".
    """

    path: str
    index: int
    layer: str

    @property
    def block(self) -> str:
        """Return the path of the module that holds the fused parameters."""
        return self.path.removesuffix(_IN_CHECKPOINT) + _IN_MODEL if _is_mixtrals(self.path) else self.path

    @property
    def is_down(self) -> bool:
        """Return whether it is the second layer of its feed-forward block."""
        return self.layer in _DOWN_LAYERS

    @property
    def parameter(self) -> str:
        """Return the path of the fused parameter."""
        return f"{self.block}.{DOWN if self.is_down else GATE_UP}"

    @property
    def half(self) -> int | None:
        """Return 0 for the first half of the outputs of gate_up_proj, 1 for the second, None for all."""
        return _HALVES.get(self.layer)

    @property
    def down(self) -> str:
        """Return the path of the second layer of the same expert."""
        return self.beside("w2" if self.layer in ("w1", "w2", "w3") else DOWN)

    def beside(self, layer: str) -> str:
        """Return the path of another layer of the same expert."""
        return f"{self.path}.{self.index}.{layer}"

    def weight(self, model: Any) -> Tensor:
        """Return the base model's weight [out, in], a view of the fused parameter.

        Raises:  ModelError: the model has no such expert.
        """
        from qpa.errors import ModelError

        try:
            block = model.get_submodule(self.block)
            fused: Tensor = getattr(block, DOWN if self.is_down else GATE_UP)[self.index]
        except (AttributeError, IndexError) as error:
            path = f"{self.block}.{self.index}"
            raise ModelError(path, "an expert of the base model", "none") from error
        if stores_experts_transposed(block):
            fused = fused.T
        if self.half is None:
            return fused
        width = fused.shape[0] // 2
        return fused[self.half * width : (self.half + 1) * width]


def _is_mixtrals(path: str) -> bool:
    return path.endswith(_IN_CHECKPOINT)


def expert_layer(module: str) -> ExpertLayer | None:
    """Return the layer of an expert that a path names, None for any other path."""
    match = _EXPERT.fullmatch(module)
    return ExpertLayer(match["path"], int(match["index"]), match["layer"]) if match else None


def has_experts(modules: Iterable[str]) -> bool:
    """Return whether one of some modules is a layer of an expert."""
    return any(expert_layer(module) is not None for module in modules)


def is_stacked(expert: ExpertLayer, modules: Collection[str]) -> bool:
    """Return whether an expert's layers are of the stacked form.

    Args:    modules: all adapted modules.
    """
    return expert.layer == GATE_UP or expert.beside(GATE_UP) in modules


def needs_beside(expert: ExpertLayer, known: Collection[str]) -> str | None:
    """Return the layer of the same expert without which PEFT or an engine does not read one; None for none.

    Args:    known: all layers of the model's experts.
    """
    if not expert.is_down:
        return expert.down
    return expert.beside(GATE_UP) if expert.beside(GATE_UP) in known else None


def expert_layers(model: Any) -> dict[str, Layer]:
    """Return every layer of every fused expert of which there is a form that PEFT and an engine read."""
    layers: dict[str, Layer] = {}
    for path, block in model.named_modules():
        if path.endswith(".experts") and (found := _layers_of_each(path, block, model)):
            prefix = path.removesuffix(_IN_MODEL) + _IN_CHECKPOINT if "w1" in found else path
            for index in range(len(getattr(block, DOWN))):
                layers |= {f"{prefix}.{index}.{name}": layer for name, layer in found.items()}
    return layers


def _layers_of_each(path: str, block: Any, model: Any) -> dict[str, Layer]:
    """Return the layers that each expert of a block has, by name; {} where there is no common form."""
    from torch.nn import Parameter

    gate_up, down = (getattr(block, name, None) for name in (GATE_UP, DOWN))
    if not isinstance(gate_up, Parameter) or not isinstance(down, Parameter) or down.ndim != 3:
        return {}
    names = names_of_experts(model.config.model_type)
    n_experts, *sides = down.shape
    if stores_experts_transposed(block):
        width, hidden = sides
        is_known = not names and tuple(gate_up.shape) == (n_experts, hidden, 2 * width)
        return {GATE_UP: Layer(hidden, 2 * width), DOWN: Layer(width, hidden)} if is_known else {}
    hidden, width = sides
    if not path.endswith(_IN_MODEL) or tuple(gate_up.shape) != (n_experts, 2 * width, hidden):
        return {}
    by_parameter = {GATE_UP: Layer(hidden, width), DOWN: Layer(width, hidden)}
    return {name: by_parameter[parameter] for name, parameter in names.items() if parameter in by_parameter}


def fused_parameters(model: Any) -> list[str]:
    """Return the parameters that hold the weights of all experts of a mixture at once."""
    import torch

    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and min(value.shape) > 1 and not isinstance(module, torch.nn.Conv1d)
    ]


def names_of_other_layers(model: Any) -> frozenset[str]:
    """Return names of layers outside the experts that in target_modules would mean the experts."""
    return frozenset(names_of_experts(model.config.model_type)) if fused_parameters(model) else frozenset()


def layers_beside_experts(model: Any) -> dict[str, Layer]:
    """Return the linear layers, without those whose names PEFT takes for fused experts."""
    taken = names_of_other_layers(model)
    return {path: layer for path, layer in linear_layers(model).items() if last_component(path) not in taken}


def parameter_name(tensor: AdapterTensor, expert: ExpertLayer, adapted: Collection[str]) -> str:
    """Return the name of the parameter of a model in PEFT that holds an expert's tensor.

    Args:    adapted: all adapted modules; where both parameters of a block are adapted, one wraps the other.
    """
    is_inner = not expert.is_down and expert.down in adapted
    return module_parameter(parameter_inside(expert.block) if is_inner else expert.block, tensor.role)


def parameter_part(parameter: Parameter, role: str, expert: ExpertLayer, rank: int) -> ParameterView:
    """Return an expert's lora_A or lora_B in PEFT's parameter for all experts."""
    from qpa.adapters.parameter_view import ParameterView

    n_layers, place = (1, 0) if expert.half is None else (2, expert.half)
    if role == "lora_A":
        return ParameterView(parameter, partial(_rows, expert.index * n_layers + place, rank))
    return ParameterView(parameter, partial(_columns, expert.index, n_layers, place, rank))


def is_partly_trained(tensor: AdapterTensor) -> bool:
    """Return whether the parameter that holds a tensor has parts that are no tensors and stay zero."""
    if tensor.role != "lora_B":
        return False
    expert = expert_layer(tensor.module)
    return expert is not None and expert.half is not None


def keep_unmixed(wrapped: Any, spec: AdapterSpec) -> None:
    """Keep the gradient of every gate_up_proj's lora_B to the parts that are trained.

    Otherwise the norm by which the whole gradient is clipped would count the quarters that mix two layers.
    """
    if not any(is_partly_trained(tensor) for tensor in spec.tensors):
        return
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and name.endswith(FUSED_GATE_UP_B):
            parameter.register_hook(partial(_unmixed, spec.rank))


def stacks(tensors: Sequence[TensorRef]) -> dict[str, list[TensorRef]]:
    """Return the tensors of experts of the stacked form, expert by expert, by the path of PEFT's tensor."""
    modules = {tensor.module for tensor in tensors}
    found: dict[str, list[tuple[int, TensorRef]]] = {}
    for tensor in tensors:
        expert = expert_layer(tensor.module)
        if expert is not None and is_stacked(expert, modules):
            path = expert.block if expert.is_down else parameter_inside(expert.block)
            found.setdefault(f"{path}.{tensor.role}.weight", []).append((expert.index, tensor))
    return {path: [tensor for _, tensor in sorted(pairs, key=_index)] for path, pairs in found.items()}


def _index(pair: tuple[int, TensorRef]) -> int:
    return pair[0]


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
