"""A base model with an adapter in PEFT."""

from __future__ import annotations

from typing import Any

from qpa.compat.peft_ import ADAPTER_NAME, quiet_about_experts
from qpa.errors import ModelError, one_sentence


def wrap_in_peft(model: Any, config: Any, title: str) -> Any:
    """Return a `peft.PeftModel` with an adapter of PEFT's own initial values.

    Args:    model: changed in place.
             config: of PEFT, for the kind of adapter.
             title: what people call the kind.
    Raises:  ModelError: PEFT cannot put the adapter on such a model.
    """
    from peft import get_peft_model

    try:
        with quiet_about_experts():
            return get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except (ValueError, TypeError) as error:
        expected = f"a model for which PEFT supports {title}"
        raise ModelError(type(model).__name__, expected, one_sentence(error)) from error
