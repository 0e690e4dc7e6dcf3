"""llama.cpp: a LoRA GGUF on a base model that is GGUF already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import EngineRecord, NeededFile, Request

ENGINE = EngineRecord(
    "llama.cpp",
    package="llama_cpp",
    file=__file__,
    own_environment=True,
    tolerance=2e-3,  # ggml's GELU is a table in float16
    needs=(
        NeededFile(
            option="base_gguf",
            expected="a GGUF file of the base model",
            example="base.gguf",
            advice="make one with llama.cpp's convert_hf_to_gguf.py, --outtype f32",
        ),
    ),
)


class LlamaCppEngine:
    """A model of llama.cpp with the adapter; it refuses an adapter with a tensor it does not know."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Return float32[n, n_vocabulary]."""
        self.model.reset()
        self.model.eval(tokens)
        return np.array(self.model.scores[: len(tokens)], dtype=np.float32)

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the most probable next token, n_new times, one at a time on the engine's cache."""
        tokens = [int(self.logits(prompt)[-1].argmax())]
        while len(tokens) < n_new:
            self.model.eval(tokens[-1:])
            tokens.append(int(np.argmax(self.model.scores[self.model.n_tokens - 1])))
        return tokens


def open_engine(request: Request) -> LlamaCppEngine:
    """Load the base of a request and the adapter of its directory."""
    return load(request["base_gguf"], str(Path(request["directory"]) / "adapter.gguf"))


def load(base: str, adapter: str | None) -> LlamaCppEngine:
    """Load a GGUF file, with an adapter or without."""
    import llama_cpp

    return LlamaCppEngine(
        llama_cpp.Llama(
            base,
            lora_path=adapter,
            n_ctx=128,
            n_threads=1,
            logits_all=True,
            # Keys and values are kept in float16 otherwise.
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    )
