"""PEFT and transformers: an adapter directory on the base model, or a merged directory alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Keys = tuple[list[str], list[str]]


class TorchEngine:
    """A causal language model of transformers, in float32 on the CPU."""

    def __init__(self, model: Any, missing: list[str], unexpected: list[str]) -> None:
        self.model = model.eval()
        self.missing_keys, self.unexpected_keys = missing, unexpected

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Return float32[n, n_vocabulary]."""
        import torch

        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([tokens])).logits[0].float()
        found: npt.NDArray[np.float32] = logits.numpy()
        return found

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the most probable next token, n_new times, without a cache."""
        tokens = list(prompt)
        for _ in range(n_new):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def open_engine(name: str, request: dict[str, Any]) -> TorchEngine:
    """Load the directory of a request with "peft" or "transformers"."""
    if request["format"] == "merged":
        return load_merged(request["directory"], trust_remote_code=request["trust_remote_code"])
    load = {"peft": load_in_peft, "transformers": load_in_transformers}[name]
    model, (missing, unexpected) = load(load_base(request), request["directory"])
    return TorchEngine(model, missing, unexpected)


def load_base(request: dict[str, Any]) -> Any:
    """Return the base model, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        request["model"],
        revision=request["revision"],
        trust_remote_code=request["trust_remote_code"],
        dtype=torch.float32,
    )


def load_merged(directory: str, *, trust_remote_code: bool) -> TorchEngine:
    """Load a directory that is a model of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    missing = sorted(set(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]})
    return TorchEngine(model, missing, sorted(info["unexpected_keys"]))


def load_in_peft(model: Any, directory: str) -> tuple[Any, Keys]:
    """Load with `PeftModel.from_pretrained`, which only warns of keys; keep what it was told of them."""
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
    return model, (sorted(missing), sorted(unexpected))


def load_in_transformers(model: Any, directory: str) -> tuple[Any, Keys]:
    """Load with transformers' own `load_adapter`; a tensor of another shape counts as missing."""
    info = model.load_adapter(directory)
    if info.error_msgs:
        raise RuntimeError(str(info.error_msgs[0]))
    mismatched = {str(entry[0]) for entry in info.mismatched_keys}
    return model, (sorted(set(info.missing_keys) | mismatched), sorted(info.unexpected_keys))
