"""The process verify-adapter starts: answer the probe with engines that know nothing of qpa.

Rules:
1. qpa, Qiskit and its packages, PennyLane and Cirq cannot be imported, from before anything is loaded.
2. All engines of a request answer in this process; the base model is loaded anew for each, in float32.
3. The request is JSON on stdin, the answer JSON on stdout; whatever libraries print goes to stderr.
4. Only numpy, safetensors and the engines' own packages are needed, so that the Python of another
   environment can run this file.

Request:  {"directory", "format", "probe", "model", "revision", "trust_remote_code", "checks_base",
          "base_gguf", "engines": [..]}
Answer:   {"largest_live_logit", "largest_adapter_effect", "base_difference", "base_tokens", "engines":
          [{"engine", "max_logit_difference", "max_base_difference", "greedy_tokens",
          "greedy_tokens_equal", "missing_keys", "unexpected_keys"}]}; differences are null where an engine
          gives no logits; base_difference and base_tokens are null unless checks_base

Source: ours.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

BLOCKED = ("qpa", "qiskit", "pennylane", "cirq", "passes", "exporters")

ENGINE_MODULES = {
    "peft": "torch_engine",
    "transformers": "torch_engine",
    "onnxruntime": "onnx_engine",
    "onnxruntime-genai": "genai_engine",
    "vllm": "vllm_engine",
    "llama.cpp": "llama_cpp_engine",
    "mlx": "mlx_engine",
}

Probe = dict[str, npt.NDArray[Any]]


class Engine(Protocol):
    """A model with the adapter, in an engine that serves it.

    Args:    missing_keys, unexpected_keys: what the engine wanted and did not find, and found and did not
             want; known at the latest after `greedy`.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32] | None:
        """Return float32[n_tokens, n_vocabulary], or None where the engine does not give them."""
        ...

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the greedy continuation of a prompt."""
        ...


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
    sys.path.insert(0, str(Path(__file__).parent))
    sys.meta_path.insert(0, ImportBlocker())
    answer = answer_probe(request)
    with answer_stream:
        json.dump(answer, answer_stream)


def answer_probe(request: dict[str, Any]) -> dict[str, Any]:
    """Answer the probe with the base model, if asked to, and with every engine of the request."""
    from safetensors.numpy import load_file

    probe: Probe = load_file(request["probe"])
    answer: dict[str, Any] = {
        "largest_live_logit": float(np.abs(probe["logits"]).max()),
        "largest_adapter_effect": _largest_difference(probe["logits"], probe["base_logits"]),
        "base_difference": None,
        "base_tokens": None,
    }
    if request["checks_base"]:
        answer |= _ask_base(request, probe)
    answer["engines"] = [_check_engine(engine, request, probe) for engine in request["engines"]]
    return answer


def _ask_base(request: dict[str, Any], probe: Probe) -> dict[str, Any]:
    torch_engine = _engine_module("torch_engine")
    base: Engine = torch_engine.TorchEngine(torch_engine.load_base(request), [], [])
    return {
        "base_difference": _largest_difference(_probe_logits(base, probe), probe["base_logits"]),
        "base_tokens": base.greedy(probe["input_ids"].tolist(), len(probe["greedy"])),
    }


def _engine_module(name: str) -> Any:
    package = f"{__package__}." if __package__ else ""
    return import_module(f"{package}{name}")


def _check_engine(name: str, request: dict[str, Any], probe: Probe) -> dict[str, Any]:
    engine: Engine = _engine_module(ENGINE_MODULES[name]).open_engine(name, request)
    prompt, expected = probe["input_ids"].tolist(), probe["greedy"].tolist()
    logits = _probe_logits(engine, probe)
    greedy = engine.greedy(prompt, len(expected))
    return {
        "engine": name,
        "max_logit_difference": _largest_difference(logits, probe["logits"]),
        "max_base_difference": _largest_difference(logits, probe["base_logits"]),
        "greedy_tokens": greedy,
        "greedy_tokens_equal": greedy == expected,
        "missing_keys": engine.missing_keys,
        "unexpected_keys": engine.unexpected_keys,
    }


def _probe_logits(engine: Engine, probe: Probe) -> npt.NDArray[np.float32] | None:
    """Return float32[n_prompt, n_columns]."""
    logits = engine.logits(probe["input_ids"].tolist())
    return None if logits is None else logits[:, probe["columns"]]


def _largest_difference(left: npt.NDArray[Any] | None, right: npt.NDArray[Any]) -> float | None:
    return None if left is None else float(np.abs(left - right).max())


if __name__ == "__main__":
    main()
