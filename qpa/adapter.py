"""An ordinary PEFT adapter on a base model, holding the initial values the AdapterSpec prescribes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qpa.documents import AdapterSpec, TensorShape, WeightLayout
from qpa.errors import ModelError
from qpa.generator import initial_value

ADAPTER_NAME = "default"


def attach_adapter(model: Any, spec: AdapterSpec, layout: WeightLayout | None = None) -> Any:
    """Wrap a base model in PEFT with a trainable float32 adapter at its initial values.

    Delta W is exactly zero: lora_B is.

    Args:    model: transformers model; changed in place by PEFT.
             spec: its seed draws lora_A.
             layout: of the generator that will train it, see `initial_adapter`.
    Returns: a `peft.PeftModel` on the model's device.
    Raises:  ModelError: PEFT does not make exactly the tensors of the spec.
    """
    peft_model = wrap_model(model, spec)
    set_adapter(adapter_parameters(peft_model, spec), initial_adapter(spec, layout))
    return peft_model


def wrap_model(model: Any, spec: AdapterSpec) -> Any:
    """Return a base model in PEFT, with an adapter of PEFT's own initial values."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.target_modules),
        fan_in_fan_out=spec.fan_in_fan_out,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, adapter_name=ADAPTER_NAME)


def adapter_parameters(peft_model: Any, spec: AdapterSpec) -> dict[str, Parameter]:
    """Return the adapter's parameters by their path in the spec, in the spec's order.

    Raises:  ModelError: the trainable parameters are not exactly the tensors of the spec.
    """
    trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    names = {f"base_model.model.{t.module}.{t.role}.{ADAPTER_NAME}.weight": t for t in spec.tensors}
    for name in sorted(names.keys() ^ trainable.keys()):
        expected = "a tensor of the plan" if name in trainable else "a trainable tensor in PEFT"
        raise ModelError(name, expected, "none", "the base model is not the one the adapter was planned for")
    for name, tensor in names.items():
        if tuple(trainable[name].shape) != tensor.shape:
            raise ModelError(name, f"shape {tensor.shape}", str(tuple(trainable[name].shape)))
    return {tensor.path: trainable[name] for name, tensor in names.items()}


def initial_adapter(spec: AdapterSpec, layout: WeightLayout | None = None) -> dict[str, Tensor]:
    """Return the adapter's tensors before training, float32, by path.

    Args:    layout: rows of lora_A that no chunk of it fills start at zero: its generator puts the basis
             of a spectrum there. None: every row as the spec says.
    """
    seed = spec.provenance.seed
    values = {
        tensor.path: initial_value(TensorShape(path=tensor.path, shape=tensor.shape), tensor.initial, seed)
        for tensor in spec.tensors
    }
    for path, n_rows in _generated_rows(layout).items():
        values[path][n_rows:] = 0
    return values


def _generated_rows(layout: WeightLayout | None) -> dict[str, int]:
    """Return how many rows of each lora_A are chunks, where not all of them are."""
    groups = layout.groups if layout and layout.generator == "spectral" else ()
    rows = {t.path: 0 for group in groups for t in group.tensors if group.axis == "spectrum" and not t.chunks}
    return rows | {t.path: len(t.chunks) for group in groups for t in group.tensors if group.axis == "row"}


@torch.no_grad()
def set_adapter(parameters: dict[str, Parameter], values: dict[str, Tensor]) -> None:
    """Copy values into the parameters of their names."""
    for path, value in values.items():
        parameters[path].copy_(value)
