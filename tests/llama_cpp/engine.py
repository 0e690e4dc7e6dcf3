"""The process in llama.cpp's environment: logits and greedy tokens with and without an adapter.

It loads verify-adapter's own engine from its file, and imports nothing else of qpa. The request is JSON on
stdin, the answer a JSON file the request names.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

ENGINES = Path(__file__).resolve().parents[2] / "qpa" / "engines"


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    load_module = runpy.run_path(str(ENGINES / "worker.py"))["load_module"]
    load = load_module(ENGINES / "llama_cpp_engine.py").load
    answer = {
        "base": ask(load(request["model"], None), request),
        "adapter": ask(load(request["model"], request["adapter"]), request),
    }
    Path(request["answer"]).write_text(json.dumps(answer))


def ask(engine: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each prompt's logits [n_tokens, n_vocabulary] and its most probable next tokens."""
    return [
        {"logits": engine.logits(prompt).tolist(), "tokens": engine.greedy(prompt, request["n_new"])}
        for prompt in request["prompts"]
    ]


if __name__ == "__main__":
    main()
