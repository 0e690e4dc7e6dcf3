"""The base model in torch with an adapter in its weights, as an ONNX graph is traced from it.

Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from qpa.adapters.experts import expert_layer
from qpa.adapters.feed_forward_model import FeedForwardModel
from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.adapters.weight_change import bias_scale, weight_change
from qpa.errors import ModelError
from qpa.exporters.onnx.graph import Prefix, cache_shapes, module_of


@torch.no_grad()
def put_adapter(model: Any, arrays: FrozenArrays) -> None:
    """Make the base model the adapted one, but for a prefix, which is in no module.

    Args:    model: float32, changed in place.
    Raises:  ModelError: the model has no such module, or one of another shape.
             ExportError: the arrays are not finite.
    """
    frozen = arrays.frozen
    if frozen.method == "ffa":
        FeedForwardModel(model, frozen.tensors)
        for tensor in frozen.tensors:
            model.get_parameter(tensor.path).copy_(torch.from_numpy(arrays.read(tensor.path)))
    elif frozen.method != "prefix":
        for path in frozen.modules:
            expert = expert_layer(path)
            if expert is not None:
                weight = expert.weight(model)
                weight.copy_(_merged(weight, path, arrays, transposed=False))
            else:
                _merge(module_of(model, path), path, arrays)


def _merge(module: Any, path: str, arrays: FrozenArrays) -> None:
    transposed = isinstance(module, Conv1D) or path in arrays.embeddings
    module.weight = torch.nn.Parameter(_merged(module.weight, path, arrays, transposed=transposed))
    scale = bias_scale(arrays, path)
    if scale is not None and module.bias is not None:
        module.bias = torch.nn.Parameter(module.bias * torch.from_numpy(scale))


def _merged(stored: torch.Tensor, path: str, arrays: FrozenArrays, *, transposed: bool) -> torch.Tensor:
    """Return what becomes of a module's weight, as it is stored."""
    weight = stored.numpy()
    sides = arrays.sides(path)[::-1] if transposed else arrays.sides(path)
    if any(side not in (None, n) for side, n in zip(sides, weight.shape, strict=True)):
        raise ModelError(path, f"a weight of shape {sides}", str(weight.shape))
    everything = slice(None)
    change = weight_change(arrays, path, lambda: [(everything, weight)], transposed=transposed)
    return torch.from_numpy(change.apply(f"{path}.weight", everything, weight))


def read_prefix(model: Any, arrays: FrozenArrays) -> Prefix:
    """Return the keys and values of every layer, float32[1, n_heads, n_tokens, head_size]; () for none."""
    if arrays.frozen.method != "prefix":
        return ()
    states = [torch.from_numpy(arrays.read(tensor.path)) for tensor in arrays.frozen.tensors]
    shapes = [shape for shape in cache_shapes(model) for _ in range(2)]
    if [state.shape[1] for state in states] != [n_heads * size for n_heads, size in shapes]:
        found = f"{len(shapes) // 2} layers of other shapes"
        raise ModelError("the prefix", f"keys and values of {len(states) // 2} layers", found)
    parts = [s.view(len(s), *shape).transpose(0, 1)[None] for s, shape in zip(states, shapes, strict=True)]
    return tuple(zip(parts[::2], parts[1::2], strict=True))
