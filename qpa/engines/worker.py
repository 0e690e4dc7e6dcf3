"""The process verify-adapter starts: answer the probe with engines that know nothing of qpa.

Rules:
1. qpa, Qiskit and its packages, PennyLane and Cirq cannot be imported, from before anything is loaded.
2. All engines of a request answer in this process; the base model is loaded anew for each, in float32.
3. The request is JSON on stdin, the answer JSON on stdout; whatever libraries print goes to stderr.
4. Only numpy, safetensors and the engines' own packages are needed, so that the Python of another
   environment can run this file.

Request:  {"directory", "merges", "probe", "model", "revision", "trust_remote_code", "checks_base",
          "engines": [{"name", "package", "file"}]}, and the files that engines need by the names of their
          options; merges says that the directory is a model of its own
Answer:   {"largest_live_logit", "largest_adapter_effect", "base_difference", "base_tokens", "engines":
          [{"engine", "version", "max_logit_difference", "max_base_difference", "greedy_tokens",
          "greedy_tokens_equal", "missing_keys", "unexpected_keys"}]}; differences are null where an engine
          gives no logits; base_difference and base_tokens are null unless checks_base

Source: ours.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .engine import Engine

FOLDER = Path(__file__).parent
BLOCKED = ("qpa", "qiskit", "pennylane", "cirq", "passes", "exporters")

Probe = dict[str, npt.NDArray[Any]]


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
    torch_model = load_module(FOLDER / "torch_model.py")
    base: Engine = torch_model.TorchEngine(torch_model.load_base(request), [], [])
    return {
        "base_difference": _largest_difference(_probe_logits(base, probe), probe["base_logits"]),
        "base_tokens": base.greedy(probe["input_ids"].tolist(), len(probe["greedy"])),
    }


def load_module(file: Path) -> ModuleType:
    """Import the Python file of an engine; those beside this file can import each other."""
    if file.parent == FOLDER:
        return import_module(f"{_package()}.{file.stem}")
    return _import_file("outside_engine", file)


def _package() -> str:
    """Return the name of the package that this file is in; where it runs as a script, make it one."""
    if not __package__ and "engines" not in sys.modules:
        _import_file("engines", FOLDER / "__init__.py")
    return __package__ or "engines"


def _import_file(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file", name=name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_engine(asked: dict[str, str], request: dict[str, Any], probe: Probe) -> dict[str, Any]:
    engine: Engine = load_module(Path(asked["file"])).open_engine(request)
    prompt, expected = probe["input_ids"].tolist(), probe["greedy"].tolist()
    logits = _probe_logits(engine, probe)
    greedy = engine.greedy(prompt, len(expected))
    return {
        "engine": asked["name"],
        "version": getattr(sys.modules.get(asked["package"]), "__version__", None),
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
