"""A causal language model of transformers: what the engines of PEFT and of transformers both answer with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import Request


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


def load_base(request: Request) -> Any:
    """Return the base model, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        request["model"],
        revision=request["revision"],
        trust_remote_code=request["trust_remote_code"],
        dtype=torch.float32,
    )
