"""Base models with rounded weights: stored in that way, or rounded when they are loaded for a training.

A training rounds the base's weights to save memory, and leaves the adapter in float32. What it gives is an
adapter for the base as it is, and that is what it is verified with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpa.errors import ModelError, OptionError, one_sentence
from qpa.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Quantization:
    """A way to round the weights of linear layers when a model is loaded; its head stays as it is.

    Args:    package: what does it.
             words: what comes of it, for help and cards.
             config: returns transformers' config of it, for a type in which products are computed.
    """

    package: str
    words: str
    config: Callable[[torch.dtype], Any]


def _nf4(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _llm_int8(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _int8(compute: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


METHODS_ON_ROUNDED = ("lora",)
"""Kinds of adapters that are trained on rounded weights: others read the weights, or are not PEFT's."""

NF4 = Quantization("bitsandbytes", "NF4 of bitsandbytes", _nf4)
LLM_INT8 = Quantization("bitsandbytes", "LLM.int8 of bitsandbytes", _llm_int8)
INT8 = Quantization("torchao", "int8 weights of torchao", _int8)

QUANTIZATIONS: Registry[Quantization] = Registry(
    "quantize",
    {
        "4bit": "qpa.models.quantization:NF4",
        "8bit": "qpa.models.quantization:LLM_INT8",
        "int8": "qpa.models.quantization:INT8",
    },
)


def loading_quantised(name: str, device: str, compute: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which transformers rounds a model's weights as it loads them.

    Args:    name: of the quantisation.
             device: where the model goes, "cpu" or "cuda".
             compute: the type in which products are computed, where there is a choice.
    Raises:  OptionError: its package is not installed.
    """
    import torch

    kind = QUANTIZATIONS[name]
    if importlib.util.find_spec(kind.package) is None:
        raise OptionError("quantize", f"the package {kind.package}", "none", f"pip install {kind.package}")
    # accelerate compares the place of rounded weights with that of the training, number and all.
    place = torch.cuda.current_device() if device == "cuda" else device
    return {"quantization_config": kind.config(compute), "device_map": {"": place}}


def check_rounded(model: Any, name: str) -> None:
    """Check that the weights of a model were rounded, some at least, and that the model runs.

    Raises:  OptionError: none was, such as those of GPT-2, whose layers torchao does not know; or what rounds
             them cannot compute with layers of their sizes on this device.
    """
    import torch

    def is_rounded(weight: Any) -> bool:
        return not weight.is_floating_point() or type(weight.data) is not torch.Tensor

    if not any(is_rounded(parameter) for parameter in model.parameters()):
        expected = f"a model with layers that {QUANTIZATIONS[name].package} rounds"
        raise OptionError("quantize", expected, type(model).__name__, "leave `quantize` out")
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        expected, found = "a model that it can run here", one_sentence(error)
        raise OptionError("quantize", expected, found, "leave `quantize` out") from error


def check_quantization(config: Any, name: str) -> None:
    """Check that transformers knows how a config's weights are quantised and finds the packages for it.

    A missing device is no fault, since training may run on another machine.

    Args:    config: the model's config in transformers.
             name: the model's name, for the message.
    Raises:  ModelError: the kind of quantisation is unknown, or a package is not installed.
    """
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None)
    if not settings:
        return
    from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

    try:
        parsed = AutoQuantizationConfig.from_dict(dict(settings))
    except Exception as error:  # each kind checks its own fields with errors of its own
        expected, advice = "weights quantised in a way that transformers loads", _ADVICE
        raise ModelError(name, expected, one_sentence(error), advice) from error
    kind = getattr(parsed.quant_method, "value", parsed.quant_method)
    try:
        AutoHfQuantizer.from_config(parsed, pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        expected, advice = f"the packages that load {kind} weights", f"install them, or {_ADVICE}"
        raise ModelError(name, expected, f"none: {one_sentence(error)}", advice) from error
    except Exception:  # what else it asks for, devices above all, is a matter of where training runs
        return


_ADVICE = "use the model before it was quantised"
