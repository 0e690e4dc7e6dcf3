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

import torch
from transformers.pytorch_utils import Conv1D

from qpa.adapters.experts import expert_layer
from qpa.adapters.feed_forward import FeedForwardModel
from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.adapters.weight_change import bias_scale, weight_change
from qpa.documents import FrozenAdapter
from qpa.errors import ModelError
from qpa.exporters.cards.model_card import adapted_modules, adapter_words, base_name, format_card, origin
from qpa.exporters.directory import CARD_FILE, BaseModelExporter, ExportDirectory
from qpa.exporters.onnx.graph import (
    GRAPH_FILE,
    OPSET,
    Prefix,
    cache_shapes,
    module_of,
    trace_causal_lm,
    write_graph,
    write_model_files,
)
from qpa.models.base_model import load_model, load_tokenizer, moved_base
from qpa.pipeline.pass_protocol import PassContext


@final
@dataclass(frozen=True, slots=True)
class ExportOnnx(BaseModelExporter):
    """Write the base model with the adapter merged into it as an ONNX graph.

    Args:    dtype: "float32".
             model: where the base model is now; None is where it was.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "onnx"
    carries_all: ClassVar[bool] = True
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write graph, config, tokenizer and card."""
        base = moved_base(frozen.base, self.model)
        arrays = FrozenArrays.open(frozen, context)
        model = load_model(base, keep_dtype=False, trust_remote_code=self.trust_remote_code)
        put_adapter(model, arrays)
        graph = trace_causal_lm(model, prefix=read_prefix(model, arrays))
        for name in write_graph(graph, directory.path / GRAPH_FILE):
            directory.take(name)
        tokenizer = load_tokenizer(base, trust_remote_code=self.trust_remote_code)
        write_model_files(model, tokenizer, directory)
        directory.write(CARD_FILE, _card(frozen).encode())
        return arrays.rank


@torch.no_grad()
def put_adapter(model: Any, arrays: FrozenArrays) -> None:
    """Make the base model the adapted one, but for a prefix, which is in no module.

    Args:    model: float32, changed in place.
    Raises:  ModelError: the model has no such module, or one of another shape.
             ExportError: the arrays are not finite.
    """
    frozen = arrays.frozen
    if frozen.method == "ffa":
        FeedForwardModel(model, frozen.tensors)
        for tensor in frozen.tensors:
            model.get_parameter(tensor.path).copy_(torch.from_numpy(arrays.read(tensor.path)))
    elif frozen.method != "prefix":
        for path in frozen.modules:
            expert = expert_layer(path)
            if expert is not None:
                weight = expert.weight(model)
                weight.copy_(_merged(weight, path, arrays, transposed=False))
            else:
                _merge(module_of(model, path), path, arrays)


def _merge(module: Any, path: str, arrays: FrozenArrays) -> None:
    transposed = isinstance(module, Conv1D) or path in arrays.embeddings
    module.weight = torch.nn.Parameter(_merged(module.weight, path, arrays, transposed=transposed))
    scale = bias_scale(arrays, path)
    if scale is not None and module.bias is not None:
        module.bias = torch.nn.Parameter(module.bias * torch.from_numpy(scale))


def _merged(stored: torch.Tensor, path: str, arrays: FrozenArrays, *, transposed: bool) -> torch.Tensor:
    """Return what becomes of a module's weight, as it is stored."""
    weight = stored.numpy()
    sides = arrays.sides(path)[::-1] if transposed else arrays.sides(path)
    if any(side not in (None, n) for side, n in zip(sides, weight.shape, strict=True)):
        raise ModelError(path, f"a weight of shape {sides}", str(weight.shape))
    everything = slice(None)
    change = weight_change(arrays, path, lambda: [(everything, weight)], transposed=transposed)
    return torch.from_numpy(change.apply(f"{path}.weight", everything, weight))


def read_prefix(model: Any, arrays: FrozenArrays) -> Prefix:
    """Return the keys and values of every layer, float32[1, n_heads, n_tokens, head_size]; () for none."""
    if arrays.frozen.method != "prefix":
        return ()
    states = [torch.from_numpy(arrays.read(tensor.path)) for tensor in arrays.frozen.tensors]
    shapes = [shape for shape in cache_shapes(model) for _ in range(2)]
    if [state.shape[1] for state in states] != [n_heads * size for n_heads, size in shapes]:
        found = f"{len(shapes) // 2} layers of other shapes"
        raise ModelError("the prefix", f"keys and values of {len(states) // 2} layers", found)
    parts = [s.view(len(s), *shape).transpose(0, 1)[None] for s, shape in zip(states, shapes, strict=True)]
    return tuple(zip(parts[::2], parts[1::2], strict=True))


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
