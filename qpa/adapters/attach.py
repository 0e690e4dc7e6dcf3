"""An ordinary adapter on a base model, holding the initial values the AdapterSpec prescribes.

It is PEFT's, except for the feed-forward adapter, of which PEFT has none (`qpa.adapters.feed_forward`).

Initial values "base" are read from the base model: the length of every row of a weight (DoRA), and the keys
and values of tokens drawn from the vocabulary (prefix tuning; arXiv 2101.00190 found activations of real
words better than random numbers).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from qpa.adapters.experts import expert_layer, parameter_name, parameter_part, trained_part
from qpa.adapters.feed_forward import FeedForwardModel
from qpa.adapters.initial_values import initial_value
from qpa.adapters.parameter_view import AdapterParameter, ParameterView, leaf_of
from qpa.documents import EMBEDDING_ROLES, METHOD_NAMES, AdapterSpec, AdapterTensor, TensorShape
from qpa.errors import ModelError
from qpa.seeds import split_seed

ADAPTER_NAME = "default"


def attach_adapter(model: Any, spec: AdapterSpec, n_kept_rows: Mapping[str, int] | None = None) -> Any:
    """Wrap a base model with a trainable float32 adapter at its initial values.

    All but a prefix leave the model what it was: lora_B and ffa_up are zero, IA3's scales one.

    Args:    model: transformers model; changed in place.
             spec: its seed draws lora_A, ffa_down, and a prefix's tokens.
             n_kept_rows: see `initial_adapter`.
    Returns: a `peft.PeftModel` or a `FeedForwardModel` on the model's device.
    Raises:  ModelError: PEFT does not make exactly the tensors of the spec.
    """
    wrapped = wrap_model(model, spec)
    parameters = adapter_parameters(wrapped, spec)
    set_adapter(parameters, initial_adapter(spec, n_kept_rows, _values_of_base(wrapped, spec)))
    return wrapped


def wrap_model(model: Any, spec: AdapterSpec) -> Any:
    """Return a base model with an adapter of PEFT's own initial values.

    Raises:  ModelError: PEFT does not have the adapter on such a model.
    """
    from peft import get_peft_model

    if spec.method == "ffa":
        return FeedForwardModel(model, [TensorShape(path=t.path, shape=t.shape) for t in spec.tensors])
    with warnings.catch_warnings():
        # PEFT gives fused experts twice the rank by a pattern, and then looks for it among the modules only.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        try:
            wrapped = get_peft_model(model, _peft_config(model, spec), adapter_name=ADAPTER_NAME)
        except (ValueError, TypeError) as error:
            found = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            expected = f"a model on which PEFT has {METHOD_NAMES[spec.method]}"
            raise ModelError(type(model).__name__, expected, found) from error
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and (mask := trained_part(name, spec.rank)) is not None:
            parameter.register_hook(mask)
    return wrapped


def _peft_config(model: Any, spec: AdapterSpec) -> Any:
    from peft import IA3Config, LoraConfig

    if spec.method == "prefix":
        return prefix_config(model, spec.rank)
    if spec.method == "ia3":
        return IA3Config(
            target_modules=list(spec.target_modules),
            feedforward_modules=scaled_inputs(spec.target_modules, spec.tensors),
            fan_in_fan_out=spec.fan_in_fan_out,
            task_type="CAUSAL_LM",
        )
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.target_modules),
        fan_in_fan_out=spec.fan_in_fan_out,
        lora_dropout=0.0,
        bias="none",
        use_dora=spec.method == "dora",
        task_type="CAUSAL_LM",
    )


def prefix_config(model: Any, n_tokens: int) -> Any:
    """Return PEFT's config of a prefix, with the number of layers and the width of keys and values.

    Raises:  ModelError: the model has no such prefix.
    """
    from peft import PrefixTuningConfig
    from peft.utils.other import _prepare_prompt_learning_config

    config = PrefixTuningConfig(num_virtual_tokens=n_tokens, task_type="CAUSAL_LM")
    try:
        _prepare_prompt_learning_config(config, model.config)
    except (ValueError, AttributeError, KeyError) as error:
        found = str(error).splitlines()[0]
        raise ModelError(type(model).__name__, "layers with keys and values", found) from error
    return config


def scaled_inputs(targets: tuple[str, ...], tensors: tuple[AdapterTensor, ...]) -> list[str]:
    """Return the targets of IA3 whose modules have their input scaled."""
    modules = [tensor.module for tensor in tensors if tensor.axis == "row"]
    return [name for name in targets if any(f".{module}".endswith(f".{name}") for module in modules)]


def adapter_parameters(wrapped: Any, spec: AdapterSpec) -> dict[str, AdapterParameter]:
    """Return the adapter's parameters by their path in the spec, in the spec's order.

    Raises:  ModelError: the trainable parameters are not exactly the tensors of the spec.
    """
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    modules = {tensor.module for tensor in spec.tensors}
    names = {tensor.path: _parameter_name(tensor, modules) for tensor in spec.tensors}
    for name in sorted({*names.values()} ^ trainable.keys()):
        expected = "a tensor of the plan" if name in trainable else "a trainable tensor in PEFT"
        raise ModelError(name, expected, "none", "the base model is not the one the adapter was planned for")
    parameters = {t.path: _part(trainable[names[t.path]], t, spec) for t in spec.tensors}
    for tensor in spec.tensors:
        if (found := tuple(parameters[tensor.path].shape)) != tensor.shape:
            raise ModelError(names[tensor.path], f"shape {tensor.shape}", str(found))
    _check_whole(parameters, spec)
    return parameters


def _check_whole(parameters: Mapping[str, AdapterParameter], spec: AdapterSpec) -> None:
    """Check that the parts of a parameter are all of it.

    The lora_B of experts has more parts than are trained (`qpa.adapters.experts`).
    """
    n_left: Counter[Parameter] = Counter()
    for tensor in spec.tensors:
        if tensor.role != "lora_B":
            leaf = leaf_of(parameters[tensor.path])
            n_left[leaf] += tensor.n_numbers - (0 if leaf in n_left else leaf.numel())
    if any(n_left.values()):
        raise ModelError("the adapter", "tensors for all parts of PEFT's parameters", "some parts only")


def _parameter_name(tensor: AdapterTensor, modules: Collection[str]) -> str:
    """Return the name PEFT, or `FeedForwardModel`, gives the parameter that holds a tensor."""
    if (name := parameter_name(tensor, modules)) is not None:
        return f"base_model.model.{name}.{ADAPTER_NAME}.weight"
    if tensor.role.startswith("prefix_"):
        return f"prompt_encoder.{ADAPTER_NAME}.embedding.weight"
    if tensor.role.startswith("ffa_"):
        return f"model.{tensor.path}"
    name = f"base_model.model.{tensor.module}.{tensor.role}.{ADAPTER_NAME}"
    return name if tensor.role in ("ia3_l", *EMBEDDING_ROLES) else f"{name}.weight"


def _part(parameter: Parameter, tensor: AdapterTensor, spec: AdapterSpec) -> AdapterParameter:
    if expert_layer(tensor.module) is not None:
        return parameter_part(parameter, tensor, spec.rank)
    if tensor.role == "lora_magnitude_vector":
        return ParameterView(parameter, partial(torch.unsqueeze, dim=1))
    if tensor.role.startswith("prefix_"):
        first = spec.tensors.index(tensor) * tensor.shape[1]
        if parameter.shape[1] < first + tensor.shape[1]:
            expected = f"at least {first + tensor.shape[1]} numbers a token"
            raise ModelError(tensor.path, expected, str(parameter.shape[1]))
        return ParameterView(parameter, partial(torch.narrow, dim=1, start=first, length=tensor.shape[1]))
    return parameter


def _values_of_base(wrapped: Any, spec: AdapterSpec) -> dict[str, Tensor]:
    """Return the initial values that the base model has to give, float32, by path."""
    if spec.method == "prefix":
        return _prefix_of_random_tokens(wrapped.get_base_model(), spec)
    paths = {t.path: t.module for t in spec.tensors if t.initial == "base"}
    return {path: _row_lengths(wrapped.get_base_model().get_submodule(m)) for path, m in paths.items()}


@torch.no_grad()
def _row_lengths(layer: Any) -> Tensor:
    """Return float32[out, 1], the length of each output's row; PEFT rounds it to the weight's type."""
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).float()
    lengths: Tensor = torch.linalg.norm(weight, dim=0 if isinstance(base, Conv1D) else 1)
    return lengths[:, None]


@torch.no_grad()
def _prefix_of_random_tokens(model: Any, spec: AdapterSpec) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(split_seed(spec.provenance.seed, "prefix"))
    n_vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(n_vocabulary, (1, spec.rank), generator=random)
    was_training = model.training
    try:
        cache = model.eval()(input_ids=tokens.to(model.device), use_cache=True).past_key_values
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise _no_prefix(model, type(error).__name__) from error
    finally:
        model.train(was_training)
    if len(states) != len(spec.tensors) or any(state is None for state in states):
        raise _no_prefix(model, f"{len(states) // 2} layers with such a cache")
    values = {}
    for tensor, state in zip(spec.tensors, states, strict=True):
        values[tensor.path] = state[0].transpose(0, 1).flatten(1).float()
        if tuple(values[tensor.path].shape) != tensor.shape:
            found = str(tuple(values[tensor.path].shape))
            raise ModelError(tensor.path, f"keys and values of shape {tensor.shape}", found)
    return values


def _no_prefix(model: Any, found: str) -> ModelError:
    expected = "a cache of keys and values in every layer, for the prefix to be in"
    return ModelError(type(model).__name__, expected, found, "use another --method")


def initial_adapter(
    spec: AdapterSpec,
    n_kept_rows: Mapping[str, int] | None = None,
    from_base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the adapter's tensors before training, float32, by path.

    Args:    n_kept_rows: how many rows of some tensors stay as the spec says; those after them start at zero,
             because the generator puts something fixed there (`qpa.generators.chunks.kept_rows`).
             from_base: the values that the base model gives, by path.
    """
    seed = spec.provenance.seed
    values = dict(from_base or {})
    for tensor in spec.tensors:
        if tensor.initial != "base":
            shape = TensorShape(path=tensor.path, shape=tensor.shape)
            values[tensor.path] = initial_value(shape, tensor.initial, seed)
    for path, n_rows in (n_kept_rows or {}).items():
        values[path][n_rows:] = 0
    return {tensor.path: values[tensor.path] for tensor in spec.tensors}


@torch.no_grad()
def set_adapter(parameters: Mapping[str, AdapterParameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of their names."""
    for path, value in values.items():
        parameters[path].detach().copy_(value)
