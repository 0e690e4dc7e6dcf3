"""What qpa uses of PEFT beyond its documented interface, as seen in PEFT 0.21."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ADAPTER_NAME = "default"
"""The name under which PEFT puts an adapter on a model, where no other is given."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

KEY_PREFIX = "base_model.model."
"""What stands before a module's path in the names of a wrapped model's parameters, and in a file's keys."""

PROMPT_PARAMETER = f"prompt_encoder.{ADAPTER_NAME}.embedding.weight"
"""The name of the parameter that holds the prefixes of all layers, [n_tokens, n_layers * 2 * width]."""

PROMPT_KEY = "prompt_embeddings"
"""The key of that parameter in a file."""

FUSED_GATE_UP_B = f".experts.base_layer.lora_B.{ADAPTER_NAME}.weight"
"""The end of the name of the lora_B of fused experts' gate_up_proj, whose wrapper is inside down_proj's."""


def module_parameter(module: str, role: str, *, is_module: bool = True) -> str:
    """Return the name of an adapter's parameter in a wrapped model.

    Args:    module: path of the adapted module, or of a wrapper inside it.
             role: the name of the role, such as "lora_A".
             is_module: whether a module has that name, and the parameter is its weight.
    """
    name = f"{KEY_PREFIX}{module}.{role}.{ADAPTER_NAME}"
    return f"{name}.weight" if is_module else name


def parameter_inside(module: str) -> str:
    """Return the path of the inner one of two wrappers of one module."""
    return f"{module}.base_layer"


def names_of_experts(model_type: str) -> Mapping[str, str]:
    """Return the names in target_modules that PEFT takes for a mixture's experts, whatever module has them.

    Returns: for each name the parameter that PEFT adapts instead: for "gate_proj" and "up_proj", or "w1" and
             "w3", it is "gate_up_proj", and for the router's "gate" it is "gate.weight". {} for a model of
             which a name means the modules that have it.
    """
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    names: Mapping[str, str] = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
    return names


def complete_prompt_config(config: Any, model_config: Any) -> None:
    """Give a config of a prefix the number of layers and the width of the keys of a model.

    Raises:  ValueError, AttributeError, KeyError: the model's config does not say them.
    """
    from peft.utils.other import _prepare_prompt_learning_config

    _prepare_prompt_learning_config(config, model_config)


def dequantized_weight(module: Any) -> Any:
    """Return the weight of a linear layer as floating-point numbers, whatever it is stored as."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


@contextmanager
def quiet_about_experts() -> Iterator[None]:
    """Keep a warning away that is no fault of the user's.

    PEFT gives fused experts twice the rank by a pattern, and then looks for it among the modules only.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield


def is_adapted(module: Any) -> bool:
    """Return whether PEFT has put an adapter on a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
