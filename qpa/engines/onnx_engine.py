"""onnxruntime: a merged graph, or a base graph with an adapter that is active at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import EngineRecord, Request

ENGINE = EngineRecord("onnxruntime", package="onnxruntime", file=__file__)

Array = npt.NDArray[Any]


class OnnxEngine:
    """A causal language model as one graph, with or without a key-value cache.

    Args:    options: onnxruntime RunOptions of every run, with the adapter active where there is one.
             adapter: the adapter, which is kept alive here, since the options do not do that.
    """

    def __init__(
        self, session: Any, options: Any, adapter: Any, missing: list[str], unexpected: list[str]
    ) -> None:
        self.session, self.options, self.adapter = session, options, adapter
        self.missing_keys, self.unexpected_keys = missing, unexpected
        self.inputs = {entry.name: entry for entry in session.get_inputs()}
        self.outputs = [entry.name for entry in session.get_outputs()]
        self.has_cache = any(name.startswith("past_key_values.") for name in self.inputs)

    def logits(self, tokens: list[int]) -> Array:
        """Return float32[n, n_vocabulary]."""
        return self._run(tokens, self._empty_cache(), n_past=0)[0].astype(np.float32)

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the most probable next token, n_new times, one at a time where there is a cache."""
        tokens, cache, n_past = list(prompt), self._empty_cache(), 0
        while len(tokens) < len(prompt) + n_new:
            logits, present = self._run(tokens[n_past:], cache, n_past)
            if self.has_cache:
                cache, n_past = present, len(tokens)
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]

    def _run(self, tokens: list[int], cache: dict[str, Array], n_past: int) -> tuple[Array, dict[str, Array]]:
        n_all = n_past + len(tokens)
        feed = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, n_all), dtype=np.int64),
            "position_ids": np.arange(n_past, n_all, dtype=np.int64)[None],
        }
        feed = {name: value for name, value in feed.items() if name in self.inputs} | cache
        values = dict(zip(self.outputs, self.session.run(None, feed, self.options), strict=True))
        present = {name.replace("present.", "past_key_values."): values[name] for name in values}
        return values["logits"][0], {name: present[name] for name in cache}

    def _empty_cache(self) -> dict[str, Array]:
        """Return caches of no tokens: their batch is 1, and the other named dimension, the length, is 0."""
        caches = {}
        for name, entry in self.inputs.items():
            if name.startswith("past_key_values."):
                sizes = [size if isinstance(size, int) else 0 for size in entry.shape]
                caches[name] = np.zeros((1, *sizes[1:]), dtype=np.float32)
        return caches


def open_engine(request: Request) -> OnnxEngine:
    """Load the graph of a request, and its adapter."""
    import onnxruntime

    directory, options = Path(request["directory"]), onnxruntime.RunOptions()
    if request["merges"]:
        session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
        return OnnxEngine(session, options, None, [], [])
    graph, adapter_file = directory / "base" / "model.onnx", str(directory / "adapter.onnx_adapter")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(adapter_file)
    options.add_active_adapter(adapter)
    given = set(onnxruntime.AdapterFormat.read_adapter(adapter_file).get_parameters())
    wanted = {entry.name for entry in session.get_overridable_initializers()}
    return OnnxEngine(session, options, adapter, sorted(wanted - given), sorted(given - wanted))
