"""onnx: the merged causal language model as one ONNX graph with a key-value cache.

Rules:
1. An adapted weight becomes what the kind of adapter says (`qpa.adapters.weight_kind`), in float32, as a
   parameter of its own: a head that was tied to the input embedding no longer is, so that the embedding
   stays the base's.
2. A feed-forward adapter is part of the graph, and so is a prefix: the cache that goes in and out is without
   it, and positions count from 0.
3. The graph is as in `qpa.exporters.onnx.graph`, beside the model's config and tokenizer.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.onnx.files import GRAPH_FILE
from qpa.exporters.onnx.format import OnnxExporter


@final
@dataclass(frozen=True, slots=True)
class ExportOnnx(OnnxExporter):
    """Write the base model with the adapter merged into it as an ONNX graph.

    Args:    dtype: "float32".
             model: where the base model is now; None is where it was.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "onnx"
    words: ClassVar[str] = "base model and adapter as one ONNX graph"
    files: ClassVar[tuple[str, ...]] = (GRAPH_FILE,)
    engines: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    merges: ClassVar[bool] = True
    carries_all: ClassVar[bool] = True

    def write_adapter(self, arrays: FrozenArrays, directory: ExportDirectory) -> None:
        """Write nothing: the adapter is in the graph."""

    def write_graph(self, arrays: FrozenArrays, model: Any, directory: ExportDirectory) -> None:
        """Write the graph of the adapted model."""
        from qpa.exporters.onnx.adapted_model import put_adapter, read_prefix
        from qpa.exporters.onnx.graph import trace_causal_lm, write_graph

        put_adapter(model, arrays)
        graph = trace_causal_lm(model, prefix=read_prefix(model, arrays))
        for name in write_graph(graph, directory.path / GRAPH_FILE):
            directory.take(name)
