"""onnx-adapter: a base graph that takes LoRA tensors as inputs, and one adapter file for it.

Rules:
1. base/model.onnx is the graph of `qpa.exporters.formats.onnx`, key-value cache included, with the base's
   weights. Each LoRA tensor is an input named by its path, lora_A [rank, in] and lora_B [out, rank], of any
   rank, with an initializer of zeros by the same name: without an adapter it is the base model.
2. adapter.onnx_adapter holds the tensors in onnxruntime's own format, adapter and model version 1. It fits
   every graph made for the same base model and the same adapted modules, whatever the rank.
3. A directory may keep base graphs, so that many adapters share one (`qpa.exporters.onnx.base_graph`).

Source: ours; onnxruntime's documentation of LoRA adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.onnx.files import ADAPTER_FILE, GRAPH_FILE, write_adapter
from qpa.exporters.onnx.format import OnnxExporter
from qpa.pipeline.options import option

BASE_FOLDER = "base/"


@final
@dataclass(frozen=True, slots=True)
class ExportOnnxAdapter(OnnxExporter):
    """Write a base graph and an adapter that onnxruntime adds to it at run time.

    Args:    dtype: "float32".
             model: where the base model is now; None is where it was.
             base_graph: directory that keeps base graphs; one that is there is linked, not made again.
             None: make it anew.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "onnx-adapter"
    words: ClassVar[str] = "a base graph, and an adapter that onnxruntime switches at run time"
    files: ClassVar[tuple[str, ...]] = (BASE_FOLDER + GRAPH_FILE, ADAPTER_FILE)
    engines: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    folder: ClassVar[str] = BASE_FOLDER

    base_graph: str | None = option(
        None,
        help="Directory that keeps the base graphs of onnx-adapter, one for many adapters.",
        is_path=True,
        provenance=False,
    )

    def write_adapter(self, arrays: FrozenArrays, directory: ExportDirectory) -> None:
        """Write the tensors by their paths."""
        tensors = {tensor.path: arrays.read(tensor.path) for tensor in arrays.frozen.tensors}
        write_adapter(tensors, directory.path / ADAPTER_FILE)
        directory.take(ADAPTER_FILE)

    def write_graph(self, arrays: FrozenArrays, model: Any, directory: ExportDirectory) -> None:
        """Write the base graph, or link the one that is kept."""
        from qpa.exporters.onnx import graph
        from qpa.exporters.onnx.base_graph import base_graph_digest, link_base_graph

        frozen, folder = arrays.frozen, directory.path / BASE_FOLDER
        folder.mkdir()
        if self.base_graph is None:
            names = graph.write_graph(graph.trace_causal_lm(model, frozen.tensors), folder / GRAPH_FILE)
        else:
            digest = base_graph_digest(frozen, model)
            names = link_base_graph(
                Path(self.base_graph), digest, lambda: graph.trace_causal_lm(model, frozen.tensors), folder
            )
        for name in names:
            directory.take(BASE_FOLDER + name)
