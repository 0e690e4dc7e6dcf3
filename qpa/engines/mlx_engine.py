"""mlx-lm: an adapter directory on the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import EngineRecord, Request

ENGINE = EngineRecord("mlx", package="mlx_lm", file=__file__, own_environment=True)


class MlxEngine:
    """A model of mlx-lm with the adapter, in float32, without a cache.

    mlx-lm adapts what the config names and loads what the file has, so each is compared with the other.
    """

    def __init__(self, model: Any, missing: list[str], unexpected: list[str]) -> None:
        self.model = model
        self.missing_keys, self.unexpected_keys = missing, unexpected

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Return float32[n, n_vocabulary]."""
        import mlx.core as mx

        logits = self.model(mx.array([tokens]))[0].astype(mx.float32)
        return np.array(logits)

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the most probable next token, n_new times."""
        tokens = list(prompt)
        for _ in range(n_new):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def open_engine(request: Request) -> MlxEngine:
    """Load the base model of a request and the adapter of its directory."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_adapters, load_model

    model, _ = load_model(_base_directory(request))
    model.set_dtype(mx.float32)
    model = load_adapters(model, request["directory"])
    model.eval()
    wanted = {key for key, _ in tree_flatten(model.parameters()) if key.endswith((".lora_a", ".lora_b"))}
    given = set(mx.load(str(Path(request["directory"]) / "adapters.safetensors")))
    return MlxEngine(model, sorted(wanted - given), sorted(given - wanted))


def _base_directory(request: Request) -> Path:
    if Path(request["model"]).is_dir():
        return Path(request["model"])
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(request["model"], revision=request["revision"]))
