"""onnx: the merged causal language model as one ONNX graph with a key-value cache.

Rules:
1. An adapted weight becomes what `qpa.adapters.weight_change` says, in float32, as a parameter of its own: a
   head that was tied to the input embedding no longer is, so that the embedding stays the base's.
2. A feed-forward adapter is part of the graph, and so is a prefix: the cache that goes in and out is without
   it, and positions count from 0.
3. The graph is as in `qpa.exporters.onnx.graph`, beside the model's config and tokenizer.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.documents import FrozenAdapter
from qpa.exporters.cards.model_card import adapted_modules, adapter_words, base_name, format_card, origin
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.onnx.files import GRAPH_FILE, OPSET
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

    def card(self, frozen: FrozenAdapter, rank: int) -> str:
        """Return the README.md."""
        return _card(frozen)


def _card(frozen: FrozenAdapter) -> str:
    return format_card(
        frozen,
        title="ONNX model",
        library="onnx",
        tags=("onnx",),
        what=f"""{base_name(frozen)} with {adapter_words(frozen)} merged into it, as one float32
ONNX graph (opset {OPSET}) with a key-value cache. {origin()}: no quantum hardware, no simulator, no qpa,
no PyTorch.

Adapted modules: {adapted_modules(frozen)}.""",
        loading=_LOADING,
        relation="merge",
    )


_LOADING = """onnxruntime; the first call has a past of length 0, later ones pass each `present` back as
`past_key_values`:

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("path/to/this/directory/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
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
    logits, *present = session.run(None, feed)
    past, n_past = dict(zip(past, present)), n_total
    new = logits[:, -1:].argmax(-1)
    tokens = np.concatenate([tokens, new], axis=1)
print(tokenizer.decode(tokens[0]))
```"""
