"""An ordinary adapter on a base model, holding the initial values that the AdapterSpec prescribes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qpa.adapters.experts import is_partly_trained
from qpa.adapters.initial_values import initial_value
from qpa.adapters.parameter_view import AdapterParameter, leaf_of
from qpa.adapters.registry import KINDS
from qpa.documents import AdapterSpec
from qpa.errors import ModelError


def attach_adapter(
    model: Any,
    spec: AdapterSpec,
    n_kept_rows: Mapping[str, int] = {},
    parent: Mapping[str, Tensor] | None = None,
) -> Any:
    """Wrap a base model with a trainable float32 adapter at its initial values.

    Every kind but a prefix leaves the model as it was: lora_B and ffa_up are zero, and IA3's scales are one.
    An adapter that goes on from another one starts as that.

    Args:    model: transformers model; changed in place.
             spec: its seed draws lora_A, ffa_down, and a prefix's tokens.
             n_kept_rows: see `initial_adapter`.
             parent: the tensors of the spec's parent, by path, where it has one.
    Returns: a `peft.PeftModel` or a `qpa.adapters.hooked_model.HookedModel` on the model's device.
    Raises:  ModelError: the wrapped model does not have exactly the tensors of the spec.
    """
    wrapped = wrap_model(model, spec)
    parameters = adapter_parameters(wrapped, spec)
    values = KINDS[spec.method].values_of_base(wrapped, spec) if spec.parent is None else parent
    set_adapter(parameters, initial_adapter(spec, n_kept_rows, values))
    return wrapped


def attach_frozen(model: Any, spec: AdapterSpec, arrays: Path) -> Any:
    """Wrap a base model with a frozen adapter, in eval mode.

    Args:    model: transformers model; changed in place.
             arrays: the frozen adapter's safetensors file, whose digest has been checked.
    Returns: see `attach_adapter`.
    Raises:  ModelError: the wrapped model does not have exactly the tensors of the spec.
    """
    from safetensors.torch import load_file

    wrapped = wrap_model(model, spec)
    set_adapter(adapter_parameters(wrapped, spec), load_file(arrays))
    return wrapped.eval()


def wrap_model(model: Any, spec: AdapterSpec) -> Any:
    """Return a base model with a trainable adapter on it, not yet at the initial values of the spec.

    Raises:  ModelError: the model has no place for the adapter.
    """
    return KINDS[spec.method].wrap(model, spec)


def adapter_parameters(wrapped: Any, spec: AdapterSpec) -> dict[str, AdapterParameter]:
    """Return the adapter's parameters by their path in the spec, in the spec's order.

    Raises:  ModelError: the trainable parameters are not exactly the tensors of the spec.
    """
    kind = KINDS[spec.method]
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    modules = {tensor.module for tensor in spec.tensors}
    names = {tensor.path: kind.parameter_name(tensor, modules) for tensor in spec.tensors}
    for name in sorted({*names.values()} ^ trainable.keys()):
        expected = "a tensor of the plan" if name in trainable else "a trainable tensor in PEFT"
        raise ModelError(name, expected, "none", "the base model is not the one the adapter was planned for")
    parameters = {t.path: kind.part(trainable[names[t.path]], t, spec) for t in spec.tensors}
    for tensor in spec.tensors:
        if (found := tuple(parameters[tensor.path].shape)) != tensor.shape:
            raise ModelError(names[tensor.path], f"shape {tensor.shape}", str(found))
    _check_whole(parameters, spec)
    return parameters


def _check_whole(parameters: Mapping[str, AdapterParameter], spec: AdapterSpec) -> None:
    """Check that the parts of every parameter make up the whole of it, where the whole is trained."""
    n_left: Counter[Parameter] = Counter()
    for tensor in spec.tensors:
        if not is_partly_trained(tensor):
            leaf = leaf_of(parameters[tensor.path])
            n_left[leaf] += tensor.n_numbers - (0 if leaf in n_left else leaf.numel())
    if any(n_left.values()):
        raise ModelError("the adapter", "tensors for all parts of PEFT's parameters", "some parts only")


def initial_adapter(
    spec: AdapterSpec, n_kept_rows: Mapping[str, int] = {}, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the adapter's tensors before training, float32, by path.

    Args:    n_kept_rows: by path, how many rows of a tensor start as the spec says; the rows after them
             start at zero, since the generator puts something of its own there. Where a path is not named,
             all rows start as the spec says, and so they do where the adapter goes on from another one.
             given: the values that the base model or the parent gives, by path.
    """
    values = dict(given or {})
    for tensor in spec.tensors:
        if tensor not in spec.given:
            seed = spec.seed
            values[tensor.path] = initial_value(tensor.path, tensor.shape, tensor.initial, seed)
    for path, n_rows in n_kept_rows.items() if spec.parent is None else ():
        values[path][n_rows:] = 0
    return {tensor.path: values[tensor.path] for tensor in spec.tensors}


@torch.no_grad()
def set_adapter(parameters: Mapping[str, AdapterParameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of their names."""
    for path, value in values.items():
        parameters[path].detach().copy_(value)
