"""Change the weights of a base model in memory to those that an adapter makes of them.

Rules:
1. A changed weight becomes a parameter of its own, so that it is no longer shared with another module.
2. The weight of a fused expert stays a part of the parameter of all experts, and is changed there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qpa.adapters.experts import expert_layer
from qpa.errors import ModelError
from qpa.models.linear_layers import stores_transpose, submodule

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.weight_kind import WeightKind


@torch.no_grad()
def change_weights(model: Any, arrays: FrozenArrays, kind: WeightKind) -> None:
    """Change the weights and biases of all adapted modules.

    Args:    model: float32, changed in place.
    Raises:  ModelError: the model has no such module, or one of another shape.
             ExportError: the arrays are not finite.
    """
    for path in arrays.frozen.modules:
        expert = expert_layer(path)
        if expert is not None:
            weight = expert.weight(model)
            weight.copy_(_changed(weight, path, arrays, kind, transposed=False))
            continue
        module = submodule(model, path)
        transposed = stores_transpose(module)
        changed = _changed(module.weight, path, arrays, kind, transposed=transposed)
        module.weight = torch.nn.Parameter(changed)
        scale = kind.bias_scale(arrays, path)
        if scale is not None and module.bias is not None:
            module.bias = torch.nn.Parameter(module.bias * torch.from_numpy(scale))


def _changed(
    stored: torch.Tensor, path: str, arrays: FrozenArrays, kind: WeightKind, *, transposed: bool
) -> torch.Tensor:
    """Return what becomes of a module's weight, as it is stored."""
    weight = stored.numpy()
    sides = kind.sides(arrays, path)[::-1] if transposed else kind.sides(arrays, path)
    if any(side not in (None, n) for side, n in zip(sides, weight.shape, strict=True)):
        raise ModelError(path, f"a weight of shape {sides}", str(weight.shape))
    everything = slice(None)
    change = kind.weight_change(arrays, path, lambda: [(everything, weight)], transposed=transposed)
    return torch.from_numpy(change.apply(f"{path}.weight", everything, weight))
