"""The process verify-adapter starts: answer the probe with engines that know nothing of qpa.

Rules:
1. qpa, Qiskit and its packages, PennyLane and Cirq cannot be imported, from before anything is loaded.
2. All engines answer in this process; the base model is loaded anew for each, in float32 on the CPU.
3. The request is JSON on stdin, the answer JSON on stdout; whatever libraries print goes to stderr.

Request:  {"directory", "probe", "model", "revision", "trust_remote_code", "engines": [..]}
Answer:   {"largest_live_logit", "base_difference", "engines": [{"engine", "max_logit_difference",
          "max_base_difference", "greedy_tokens", "greedy_tokens_equal", "missing_keys",
          "unexpected_keys"}]}

Source: ours.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCKED = ("qpa", "qiskit", "pennylane", "cirq", "passes", "exporters")

Keys = tuple[list[str], list[str]]


class ImportBlocker(importlib.abc.MetaPathFinder):
    """Refuse to import packages whose top-level name starts like a blocked one."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Return None for "ask the next finder".

        Raises:  ImportError: the package is blocked.
        """
        top_level = fullname.partition(".")[0]
        if top_level in BLOCKED or top_level.startswith("qiskit"):
            raise ImportError(f"{fullname} must not be needed to serve an adapter", name=fullname)


def main() -> None:
    """Answer one request."""
    answer_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    sys.meta_path.insert(0, ImportBlocker())
    answer = answer_probe(request)
    with answer_stream:
        json.dump(answer, answer_stream)


def answer_probe(request: dict[str, Any]) -> dict[str, Any]:
    """Answer the probe with the base model and with every engine of the request."""
    import torch
    from safetensors.torch import load_file

    probe = load_file(request["probe"])
    with torch.no_grad():
        base_logits = _probe_logits(_load_base(request), probe)
        engines = [_check_engine(engine, request, probe, base_logits) for engine in request["engines"]]
    return {
        "largest_live_logit": float(probe["logits"].abs().max()),
        "base_difference": _largest_difference(base_logits, probe["base_logits"]),
        "engines": engines,
    }


def _check_engine(
    engine: str, request: dict[str, Any], probe: dict[str, Tensor], base_logits: Tensor
) -> dict[str, Any]:
    load: Callable[[Any, str], tuple[Any, Keys]] = {
        "peft": load_in_peft,
        "transformers": load_in_transformers,
    }[engine]
    model, (missing, unexpected) = load(_load_base(request), request["directory"])
    model.eval()
    logits = _probe_logits(model, probe)
    greedy = _greedy_continuation(model, probe["input_ids"], len(probe["greedy"]))
    return {
        "engine": engine,
        "max_logit_difference": _largest_difference(logits, probe["logits"]),
        "max_base_difference": _largest_difference(logits, base_logits),
        "greedy_tokens": greedy,
        "greedy_tokens_equal": greedy == probe["greedy"].tolist(),
        "missing_keys": missing,
        "unexpected_keys": unexpected,
    }


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
    return model, (sorted(results[0].missing_keys), sorted(results[0].unexpected_keys))


def load_in_transformers(model: Any, directory: str) -> tuple[Any, Keys]:
    """Load with transformers' own `load_adapter`; a tensor of another shape counts as missing."""
    info = model.load_adapter(directory)
    if info.error_msgs:
        raise RuntimeError(str(info.error_msgs[0]))
    mismatched = {str(entry[0]) for entry in info.mismatched_keys}
    return model, (sorted(set(info.missing_keys) | mismatched), sorted(info.unexpected_keys))


def _load_base(request: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        request["model"],
        revision=request["revision"],
        trust_remote_code=request["trust_remote_code"],
        dtype=torch.float32,
    )
    return model.eval()


def _probe_logits(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """Return float32[n_prompt, n_columns]."""
    logits: Tensor = model(input_ids=probe["input_ids"][None]).logits[0].float()
    return logits[:, probe["columns"]]


def _greedy_continuation(model: Any, prompt: Tensor, n_new: int) -> list[int]:
    import torch

    tokens = prompt
    for _ in range(n_new):
        logits = model(input_ids=tokens[None]).logits[0, -1]
        tokens = torch.cat((tokens, logits.argmax()[None]))
    new_tokens: list[int] = tokens[len(prompt) :].tolist()
    return new_tokens


def _largest_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


if __name__ == "__main__":
    main()
