"""Whether this machine has what a quantised base model's weights need, asked before they are loaded."""

from __future__ import annotations

from typing import Any

from qpa.errors import ModelError, one_sentence


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
