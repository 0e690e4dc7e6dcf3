"""onnx: the merged causal language model as one ONNX graph with a key-value cache.

Rules:
1. An adapted weight becomes W + B A in float32, as a parameter of its own: a head that was tied to the
   input embedding no longer is, so that the embedding stays the base's.
2. The graph is as in `qpa.exporters.onnx_graph`, beside the model's config and tokenizer.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from qpa.base_model import load_model, load_tokenizer, moved_base
from qpa.documents import FrozenAdapter
from qpa.errors import ModelError
from qpa.exporters.export_directory import CARD_FILE, BaseModelExporter, ExportDirectory
from qpa.exporters.frozen_arrays import FrozenArrays
from qpa.exporters.model_card import adapted_modules, base_name, format_card, origin
from qpa.exporters.onnx_graph import (
    GRAPH_FILE,
    OPSET,
    ROLES,
    module_of,
    trace_causal_lm,
    write_graph,
    write_model_files,
)
from qpa.pipeline import PassContext


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
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write graph, config, tokenizer and card."""
        base = moved_base(frozen.base, self.model)
        arrays = FrozenArrays.open(frozen, context)
        model = load_model(base, keep_dtype=False, trust_remote_code=self.trust_remote_code)
        merge_adapter(model, arrays)
        for name in write_graph(trace_causal_lm(model), directory.path / GRAPH_FILE):
            directory.take(name)
        tokenizer = load_tokenizer(base, trust_remote_code=self.trust_remote_code)
        write_model_files(model, tokenizer, directory)
        directory.write(CARD_FILE, _card(frozen).encode())
        return arrays.rank


@torch.no_grad()
def merge_adapter(model: Any, arrays: FrozenArrays) -> None:
    """Replace every adapted weight W by W + B A, or its transpose in a Conv1D layer.

    Args:    model: float32, changed in place; lora_B is float32[out, r] and lora_A float32[r, in].
    Raises:  ModelError: the model has no such module, or one of another shape.
             ExportError: the arrays are not finite.
    """
    for tensor in arrays.frozen.tensors:
        path, is_a, _ = tensor.path.partition(ROLES[0])
        if not is_a:
            continue
        a, b = (torch.from_numpy(arrays.read(path + role)) for role in ROLES)
        module, delta = module_of(model, path), b @ a
        delta = delta.T if arrays.frozen.fan_in_fan_out else delta
        if module.weight.shape != delta.shape:
            found = str(tuple(module.weight.shape))
            raise ModelError(path, f"a weight of shape {tuple(delta.shape)}", found)
        module.weight = torch.nn.Parameter(module.weight + delta)


def _card(frozen: FrozenAdapter) -> str:
    return format_card(
        frozen,
        title="ONNX model",
        library="onnx",
        tags=("onnx", "lora"),
        what=f"""{base_name(frozen)} with a rank-{frozen.rank} LoRA merged into its weights, as one float32
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
