"""PEFT: an adapter directory on the base model."""

from __future__ import annotations

from typing import Any

from .engine import EngineRecord, Request
from .torch_model import TorchEngine, load_base

ENGINE = EngineRecord("peft", package="peft", file=__file__)


def open_engine(request: Request) -> TorchEngine:
    """Load the base model of a request and the adapter of its directory."""
    return TorchEngine(*load_in_peft(load_base(request), request["directory"]))


def load_in_peft(model: Any, directory: str) -> tuple[Any, list[str], list[str]]:
    """Load with `PeftModel.from_pretrained`, which only warns of wrong keys; return these keys too."""
    from peft import PeftModel

    results: list[Any] = []
    load_adapter = PeftModel.load_adapter

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        results.append(load_adapter(self, *arguments, **options))
        return results[-1]

    PeftModel.load_adapter = recording
    try:
        model = PeftModel.from_pretrained(model, directory)
    finally:
        PeftModel.load_adapter = load_adapter
    missing, unexpected = results[0].missing_keys, results[0].unexpected_keys
    if model.active_peft_config.is_prompt_learning:
        # PEFT has loaded it, strictly, into the prompt's encoder; to the base model's modules it is unknown.
        unexpected = [key for key in unexpected if key != "prompt_embeddings"]
    return model, sorted(missing), sorted(unexpected)
