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
from qpa.documents import FrozenAdapter
from qpa.exporters.cards.model_card import adapted_modules, base_name, format_card, origin
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.onnx.files import ADAPTER_FILE, GRAPH_FILE, OPSET, write_adapter
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
        shapes = dict(sorted((tensor.path, tensor.shape) for tensor in frozen.tensors))
        folder.mkdir()
        if self.base_graph is None:
            names = graph.write_graph(graph.trace_causal_lm(model, shapes), folder / GRAPH_FILE)
        else:
            digest = base_graph_digest(frozen, model)
            names = link_base_graph(
                Path(self.base_graph), digest, lambda: graph.trace_causal_lm(model, shapes), folder
            )
        for name in names:
            directory.take(BASE_FOLDER + name)

    def card(self, frozen: FrozenAdapter, rank: int) -> str:
        """Return the README.md."""
        return _card(frozen)


def _card(frozen: FrozenAdapter) -> str:
    return format_card(
        frozen,
        title="ONNX adapter",
        library="onnx",
        tags=("onnx", "lora"),
        what=f"""A rank-{frozen.rank} LoRA for {base_name(frozen)}, in `{ADAPTER_FILE}`, and the
base model as a float32 ONNX graph (opset {OPSET}) that takes it at run time. {origin()}: no
quantum hardware, no simulator, no qpa, no PyTorch.

Adapted modules: {adapted_modules(frozen)}. The scaling is folded into `lora_B`. Adapters of any rank for
the same modules of the same base model fit the same graph.""",
        loading=_LOADING,
    )


_LOADING = """onnxruntime, with `session.run` (`run_with_iobinding` ignores adapters). Keep the adapter object
for as long as it is in use; without `run_options` the session answers as the base model:

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("path/to/this/directory/base/model.onnx")
adapter = onnxruntime.LoraAdapter()
adapter.Load("path/to/this/directory/adapter.onnx_adapter")
run_options = onnxruntime.RunOptions()
run_options.add_active_adapter(adapter)

tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory/base")
tokens = tokenizer("Once upon a time", return_tensors="np")["input_ids"].astype(np.int64)
names = {value.name: value.shape for value in session.get_inputs()}
past = {
    name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
    for name, shape in names.items()
    if name.startswith("past_key_values.")
}
new, n_past = tokens, 0
for _ in range(32):
    n_total = n_past + new.shape[1]
    feed = {"input_ids": new, "attention_mask": np.ones((1, n_total), np.int64), **past}
    if "position_ids" in names:
        feed["position_ids"] = np.arange(n_past, n_total)[None]
    logits, *present = session.run(None, feed, run_options=run_options)
    past, n_past = dict(zip(past, present)), n_total
    new = logits[:, -1:].argmax(-1)
    tokens = np.concatenate([tokens, new], axis=1)
print(tokenizer.decode(tokens[0]))
```"""
