"""An engine from outside: the base model in transformers, with an npz export's factors added to its weights.

The worker runs this file where qpa cannot be imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class NumpyEngine:
    """A causal language model whose weights are W + B A."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []

    def logits(self, tokens: list[int]) -> Any:
        """Return float32[n, n_vocabulary]."""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([tokens])).logits[0].numpy()

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the most probable next token, n_new times."""
        tokens = list(prompt)
        for _ in range(n_new):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def open_engine(request: dict[str, Any]) -> NumpyEngine:
    """Load the base model of a request and add the factors of its directory."""
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    with np.load(Path(request["directory"]) / "factors.npz") as factors, torch.no_grad():
        for name in factors.files:
            module, _, role = name.rpartition(".")
            if role == "lora_A":
                change = factors[f"{module}.lora_B"] @ factors[name]
                model.get_submodule(module).weight += torch.from_numpy(change)
    return NumpyEngine(model)
