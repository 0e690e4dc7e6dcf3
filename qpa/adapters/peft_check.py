"""Whether PEFT makes an adapter on a model, asked on torch's meta device before there are weights.

Wrapping all 80 layers of a large model takes seconds. PEFT decides by a module's name and kind, so
among like layers of a list the first is tried for all of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

from qpa.adapters.experts import expert_layer
from qpa.documents import AdapterSpec
from qpa.errors import ModelError
from qpa.models.linear_layers import selects


def check_in_peft(model: Any, spec: AdapterSpec) -> None:
    """Check that PEFT makes exactly the tensors of a spec.

    Args:    model: on the meta device; of layers that are alike, only the first stays in it.
    Raises:  ModelError: PEFT refuses the model or a module, or makes other tensors.
    """
    kept = _without_repeats(model, spec)
    try:
        _wrap(copy.deepcopy(model), kept)
    except ModelError as error:
        accepted = [target for target in spec.target_modules if _is_accepted(model, kept, target)]
        if not accepted or len(accepted) == len(spec.target_modules):
            raise
        advice = f"name the others: `targets` {','.join(accepted)}"
        raise ModelError(error.subject, error.expected, error.found, advice) from error


def _wrap(model: Any, spec: AdapterSpec) -> None:
    import torch

    from qpa.adapters.attach import adapter_parameters, wrap_model

    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        adapter_parameters(wrap_model(model, spec), spec)


def _is_accepted(model: Any, spec: AdapterSpec, target: str) -> bool:
    """Return whether PEFT adapts the modules of one name."""
    tensors = tuple(t for t in spec.tensors if selects(target, t.module))
    try:
        _wrap(copy.deepcopy(model), spec.model_copy(update={"target_modules": (target,), "tensors": tensors}))
    except ModelError:
        return False
    return True


def _without_repeats(model: Any, spec: AdapterSpec) -> AdapterSpec:
    """Replace every layer that is like an earlier one by an Identity; return the spec of what is left."""
    import torch

    adapted = {_module_path(tensor.module) for tensor in spec.tensors}
    for path, layers in list(model.named_modules()):
        if not isinstance(layers, torch.nn.ModuleList):
            continue
        seen = set()
        for index, layer in enumerate(layers):
            description = _description(layer, f"{path}.{index}", adapted)
            if description in seen:
                layers[index] = torch.nn.Identity()
            seen.add(description)
    left = {path for path, _ in model.named_modules()}
    kept = tuple(tensor for tensor in spec.tensors if _module_path(tensor.module) in left)
    return spec.model_copy(update={"tensors": kept})


def _module_path(path: str) -> str:
    """Return the path of the module that PEFT wraps, which for a fused expert is the block of all experts."""
    expert = expert_layer(path)
    return path if expert is None else expert.block


def _description(layer: Any, path: str, adapted: Collection[str]) -> tuple[Any, ...]:
    """Return what makes PEFT treat two layers alike: kinds of modules, shapes, and what is adapted."""
    modules = tuple(
        (name, type(module), f"{path}.{name}".rstrip(".") in adapted)
        for name, module in layer.named_modules()
    )
    return modules, tuple((name, tuple(value.shape)) for name, value in layer.named_parameters())
