"""The probe: what a model answers to a fixed prompt, kept so that any reader can be compared with it.

Tensors of a probe file (safetensors):

    input_ids    int64[n_prompt]             the prompt
    columns      int64[n_columns]            vocabulary entries whose logits are kept
    logits       float32[n_prompt, n_columns]  of the live model, adapter active
    base_logits  float32[n_prompt, n_columns]  of the base model
    greedy       int64[n_new]                the live model's greedy continuation

Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

N_PROMPT = 16
N_COLUMNS = 512
N_NEW = 16


@torch.no_grad()
def record_probe(peft_model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """Return what a live PEFT model answers, in float32 and in eval mode, as tensors on the CPU.

    Args:    peft_model: the model with its adapter active; it is left in eval mode.
             input_ids: int64[n], of which the first `N_PROMPT` are used.
    Returns: the tensors of a probe file.
    """
    peft_model.eval()
    prompt = input_ids[:N_PROMPT].to(torch.int64).to(next(peft_model.parameters()).device)
    live = peft_model(input_ids=prompt[None]).logits[0].float().cpu()
    with peft_model.disable_adapter():
        base = peft_model(input_ids=prompt[None]).logits[0].float().cpu()
    columns = spread_columns(live.shape[-1])
    return {
        "input_ids": prompt.cpu(),
        "columns": columns,
        "logits": live[:, columns].contiguous(),
        "base_logits": base[:, columns].contiguous(),
        "greedy": greedy_continuation(peft_model, prompt).cpu(),
    }


def spread_columns(n_vocabulary: int) -> Tensor:
    """Return int64[min(n_vocabulary, N_COLUMNS)] entries, evenly spread over the vocabulary."""
    return (
        torch.linspace(0, n_vocabulary - 1, min(n_vocabulary, N_COLUMNS), dtype=torch.float64).round().long()
    )


@torch.no_grad()
def greedy_continuation(model: Any, prompt: Tensor) -> Tensor:
    """Return int64[N_NEW]: the most probable next token, `N_NEW` times, without a cache."""
    tokens = prompt
    for _ in range(N_NEW):
        logits = model(input_ids=tokens[None]).logits[0, -1]
        tokens = torch.cat((tokens, logits.argmax()[None]))
    return tokens[len(prompt) :]
