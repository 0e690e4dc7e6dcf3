"""onnxruntime-genai: a model directory with an adapter that is loaded and made active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import EngineRecord, Request

ENGINE = EngineRecord("onnxruntime-genai", package="onnxruntime_genai", file=__file__)


class GenaiEngine:
    """A model of onnxruntime-genai and the adapter on it; tokens are chosen here, from its logits."""

    def __init__(self, model: Any, adapters: Any) -> None:
        self.model, self.adapters = model, adapters
        # A tensor the graph does not know is an error when the adapter becomes active.
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Return float32[n, n_vocabulary]."""
        return self._append(self._generator(len(tokens)), tokens)

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the most probable next token, n_new times, one at a time on the engine's cache."""
        generator = self._generator(len(prompt) + n_new)
        new, found = list(prompt), []
        for _ in range(n_new):
            new = [int(self._append(generator, new)[-1].argmax())]
            found += new
        return found

    def _append(self, generator: Any, tokens: list[int]) -> npt.NDArray[np.float32]:
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        logits: npt.NDArray[np.float32] = generator.get_output("logits")[0].astype(np.float32)
        return logits

    def _generator(self, n_tokens: int) -> Any:
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=n_tokens + 1, batch_size=1)
        generator = onnxruntime_genai.Generator(self.model, parameters)
        generator.set_active_adapter(self.adapters, "adapter")
        return generator


def open_engine(request: Request) -> GenaiEngine:
    """Load the directory of a request."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(request["directory"])
    adapters = onnxruntime_genai.Adapters(model)
    adapters.load(str(Path(request["directory"]) / "adapter.onnx_adapter"), "adapter")
    return GenaiEngine(model, adapters)
