"""The process in llama.cpp's environment: logits and greedy tokens with and without an adapter.

It imports nothing of qpa. The request is JSON on stdin, the answer a JSON file the request names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    answer = {"base": ask(request, None), "adapter": ask(request, request["adapter"])}
    Path(request["answer"]).write_text(json.dumps(answer))


def ask(request: dict[str, Any], adapter: str | None) -> list[dict[str, Any]]:
    """Return the logits at every token of the prompts, and their greedy continuations."""
    model = llama_cpp.Llama(
        request["model"],
        lora_path=adapter,
        n_ctx=128,
        n_threads=1,
        logits_all=True,
        # Keys and values are kept in float16 otherwise.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    return [continue_prompt(model, prompt, request["n_new"]) for prompt in request["prompts"]]


def continue_prompt(model: llama_cpp.Llama, prompt: list[int], n_new: int) -> dict[str, Any]:
    """Return one prompt's logits [n_tokens, n_vocabulary] and its `n_new` most probable next tokens."""
    model.reset()
    model.eval(prompt)
    logits = model.scores[: len(prompt)].tolist()
    tokens: list[int] = []
    while len(tokens) < n_new:
        tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(tokens[-1:])
    return {"logits": logits, "tokens": tokens}


if __name__ == "__main__":
    main()
