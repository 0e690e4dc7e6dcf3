"""transformers: an adapter directory on the base model, or a merged directory alone."""

from __future__ import annotations

from typing import Any

from .engine import EngineRecord, Request
from .torch_model import TorchEngine, load_base

ENGINE = EngineRecord("transformers", package="transformers", file=__file__)


def open_engine(request: Request) -> TorchEngine:
    """Load the directory of a request, and the base model where the directory is not one of its own."""
    if request["merges"]:
        return load_merged(request["directory"], trust_remote_code=request["trust_remote_code"])
    return TorchEngine(*load_in_transformers(load_base(request), request["directory"]))


def load_merged(directory: str, *, trust_remote_code: bool) -> TorchEngine:
    """Load a directory that is a model of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    missing = sorted(set(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]})
    return TorchEngine(model, missing, sorted(info["unexpected_keys"]))


def load_in_transformers(model: Any, directory: str) -> tuple[Any, list[str], list[str]]:
    """Load with transformers' own `load_adapter`; a tensor of another shape counts as missing."""
    info = model.load_adapter(directory)
    if info.error_msgs:
        raise RuntimeError(str(info.error_msgs[0]))
    mismatched = {str(entry[0]) for entry in info.mismatched_keys}
    return model, sorted(set(info.missing_keys) | mismatched), sorted(info.unexpected_keys)
