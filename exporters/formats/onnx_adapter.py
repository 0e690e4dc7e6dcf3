"""onnx-adapter: a base graph that takes LoRA tensors as inputs, and one adapter file for it.

Rules:
1. base/model.onnx is the graph of `qpa.exporters.formats.onnx`, key-value cache included, with the base's
   weights. Each LoRA tensor is an input named by its path, lora_A [rank, in] and lora_B [out, rank], of any
   rank, with an initializer of zeros by the same name: without an adapter it is the base model.
2. adapter.onnx_adapter holds the tensors in onnxruntime's own format, adapter and model version 1. It fits
   every graph made for the same base model and the same adapted modules, whatever the rank.
3. The base graph depends on the base model's config and weights, the adapted modules and the versions of
   what traces it, and on nothing else. A directory keeps one for each, so that many adapters share it.
4. A file is never overwritten in place, for that ends a process that has it open: the export's directory
   is made aside and renamed.

Source: ours; onnxruntime's documentation of LoRA adapters.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import onnx_ir
import onnxscript
import torch
import transformers

from qpa import __version__
from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.documents import FrozenAdapter
from qpa.documents.base import digest_of
from qpa.errors import ExportError
from qpa.exporters.cards.model_card import adapted_modules, base_name, format_card, origin
from qpa.exporters.directory import CARD_FILE, BaseModelExporter, ExportDirectory
from qpa.exporters.onnx.graph import (
    GRAPH_FILE,
    OPSET,
    trace_causal_lm,
    write_graph,
    write_model_files,
)
from qpa.models.base_model import load_model, load_tokenizer, moved_base
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.atomic_files import DIRECTORY_MODE, TEMPORARY_PREFIX, sha256_of
from qpa.store.tensor_file import Array

BASE_FOLDER = "base/"
ADAPTER_FILE = "adapter.onnx_adapter"
SUMS_FILE = "sha256sums.txt"


@final
@dataclass(frozen=True, slots=True)
class ExportOnnxAdapter(BaseModelExporter):
    """Write a base graph and an adapter that onnxruntime adds to it at run time.

    Args:    dtype: "float32".
             model: where the base model is now; None is where it was.
             base_graph: directory that keeps base graphs; one that is there is linked, not made again.
             None: make it anew.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "onnx-adapter"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    base_graph: str | None = field(default=None, metadata={"provenance": False})

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write adapter, graph, config, tokenizer and card."""
        arrays = FrozenArrays.open(frozen, context)
        tensors = {tensor.path: arrays.read(tensor.path) for tensor in frozen.tensors}
        write_adapter(tensors, directory.path / ADAPTER_FILE)
        directory.take(ADAPTER_FILE)
        base = moved_base(frozen.base, self.model)
        model = load_model(base, keep_dtype=False, trust_remote_code=self.trust_remote_code)
        (directory.path / BASE_FOLDER).mkdir()
        for name in self._write_base(frozen, model, directory.path / BASE_FOLDER):
            directory.take(BASE_FOLDER + name)
        tokenizer = load_tokenizer(base, trust_remote_code=self.trust_remote_code)
        write_model_files(model, tokenizer, directory, BASE_FOLDER)
        directory.write(CARD_FILE, _card(frozen).encode())
        return arrays.rank

    def _write_base(self, frozen: FrozenAdapter, model: Any, folder: Path) -> list[str]:
        shapes = dict(sorted((tensor.path, tensor.shape) for tensor in frozen.tensors))
        if self.base_graph is None:
            return write_graph(trace_causal_lm(model, shapes), folder / GRAPH_FILE)
        kept = Path(self.base_graph) / base_graph_digest(frozen, model).removeprefix("sha256:")
        if not kept.is_dir():
            _keep(trace_causal_lm(model, shapes), kept)
        return _link_all(kept, folder)


def write_adapter(tensors: Mapping[str, Array], path: Path) -> None:
    """Write an adapter in onnxruntime's format.

    Args:    tensors: float32, by the names of the graph's inputs.
             path: of a new file, in a directory that is there.
    Raises:  OSError: it cannot be written.
    """
    from onnxruntime import AdapterFormat, OrtValue

    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(tensors[name]) for name in sorted(tensors)})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # all it says of a full disk
        raise OSError(errno.EIO, "onnxruntime cannot write to it") from error


def base_graph_digest(frozen: FrozenAdapter, model: Any) -> str:
    """Return the digest of everything a base graph depends on.

    Args:    frozen: its rank and numbers do not count.
             model: the base model with its weights, which two models of one config do not share.
    """
    return digest_of(
        {
            "config": frozen.base.config_digest,
            "weights": _weights_digest(model.state_dict().items()),
            "modules": list(frozen.modules),
            "opset": OPSET,
            "qpa": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnxscript": onnxscript.__version__,
            "onnx_ir": onnx_ir.__version__,
        }
    )


def _weights_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keep(graph: onnx_ir.Model, kept: Path) -> None:
    """Write a graph and its digests to a directory of their own; one that another export made first stays."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=kept.parent, prefix=TEMPORARY_PREFIX))
    try:
        names = write_graph(graph, work / GRAPH_FILE)
        (work / SUMS_FILE).write_text("".join(f"{sha256_of(work / n)}  {n}\n" for n in names))
        work.chmod(DIRECTORY_MODE)
        work.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link_all(kept: Path, folder: Path) -> list[str]:
    """Link the files of a kept graph, or copy them where the file system cannot; return their names.

    Raises:  ExportError: they are not what was written.
    """
    try:
        sums = [line.split("  ", 1) for line in (kept / SUMS_FILE).read_text().splitlines()]
        broken = [name for sha256, name in sums if sha256_of(kept / name) != sha256]
    except (OSError, ValueError) as error:
        sums, broken = [], [f"{type(error).__name__}"]
    if broken or not sums:
        found = f"another ({broken[0]})" if broken else "none"
        raise ExportError(str(kept), "the base graph that was written here", found, "delete the directory")
    for _, name in sums:
        try:
            os.link(kept / name, folder / name)
        except OSError:
            shutil.copyfile(kept / name, folder / name)
    return [name for _, name in sums]


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
