"""peft: a directory for PEFT of an adapter that is no LoRA: DoRA, IA3 or prefix tuning.

Rules:
1. Tensors are named and shaped as PEFT saves them, of one type, contiguous: a DoRA's magnitudes are [out], a
   prefix is one tensor prompt_embeddings [n_tokens, n_layers * 2 * width].
2. adapter_config.json has explicit lists of modules. A DoRA's lora_alpha == r: the scaling alpha / r is
   multiplied into lora_B.
3. One tensor at a time is in memory; of a prefix, all of it.

4. The result keeps `qpa.exporters.contracts.peft`.

Source: ours; names as in PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np

from qpa.adapters.frozen_arrays import SAFETENSORS_TYPE, FrozenArrays
from qpa.documents import FrozenAdapter, Manifest, module_of
from qpa.documents.finding import Finding
from qpa.exporters.cards.model_card import adapter_words
from qpa.exporters.contracts.lora import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, selects
from qpa.exporters.contracts.peft import PREFIX_KEY, check_peft_contract
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import Exporter, dtype_option
from qpa.exporters.formats.lora import adapter_config, refuse_tied, tied_head_option
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import Array, TensorPlan


@final
@dataclass(frozen=True, slots=True)
class ExportPeft(Exporter):
    """Write a frozen adapter as a directory that PEFT alone reads.

    Args:    dtype: of the tensors: "float32", "bfloat16" or "float16".
             allow_tied_head: as of `ExportLora`.
    Source:  ours.
    """

    name: ClassVar[str] = "peft"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE)
    engines: ClassVar[tuple[str, ...]] = ("peft",)

    dtype: str = dtype_option()
    allow_tied_head: bool = tied_head_option()

    @classmethod
    def check_content(cls, directory: Path, manifest: Manifest) -> Iterator[Finding]:
        """Yield what the directory breaks of the contract of its kind of adapter."""
        if {*cls.files} <= {entry.file for entry in manifest.files}:
            yield from check_peft_contract(directory, manifest.method)

    def check(self, frozen: FrozenAdapter) -> None:
        """Refuse a tied head.

        Raises:  ExportError: the adapter is on one, and it was not allowed.
        """
        if not self.allow_tied_head:
            refuse_tied(frozen)

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write config and weights."""
        arrays = FrozenArrays.open(frozen, context, dtype=self.dtype)
        kind, shapes = SAFETENSORS_TYPE[self.dtype], _shapes(frozen)
        plans = [TensorPlan(name, kind, shape) for name, shape in shapes.items()]
        directory.write_tensors(
            WEIGHTS_FILE, plans, lambda name: _read(arrays, name).reshape(shapes[name]), {"format": "pt"}
        )
        directory.write_json(CONFIG_FILE, peft_config(frozen))
        return frozen.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        tag = {"prefix": "prefix-tuning"}.get(frozen.method, frozen.method)
        what, warning = adapter_words(frozen).capitalize(), ""
        if frozen.method == "dora":
            warning = ", and transformers' `load_adapter` takes it without a word for something else"
        return {"tag": tag, "what_it_is": what, "warning": warning}


def _shapes(frozen: FrozenAdapter) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor as PEFT saves it, by its key."""
    if frozen.method == "prefix":
        return {PREFIX_KEY: (frozen.rank, sum(tensor.shape[1] for tensor in frozen.tensors))}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in frozen.tensors:
        is_vector = tensor.path.endswith(".lora_magnitude_vector")
        shapes[KEY_PREFIX + tensor.path] = tensor.shape[:1] if is_vector else tensor.shape
    return shapes


def _read(arrays: FrozenArrays, name: str) -> Array:
    if name == PREFIX_KEY:
        return np.concatenate([arrays.read(tensor.path) for tensor in arrays.frozen.tensors], axis=1)
    return arrays.read(name.removeprefix(KEY_PREFIX))


def peft_config(frozen: FrozenAdapter) -> dict[str, object]:
    """Return the content of adapter_config.json.

    What a prefix leaves out, the number of heads, PEFT takes from the base model.
    """
    common = {
        "base_model_name_or_path": frozen.base.name_or_path,
        "inference_mode": True,
        "revision": frozen.base.revision,
        "task_type": "CAUSAL_LM",
    }
    if frozen.method == "prefix":
        return common | {
            "num_layers": len(frozen.modules),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": frozen.rank,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
        }
    if frozen.method == "ia3":
        inputs = [module_of(tensor.path) for tensor in frozen.tensors if tensor.shape[0] == 1]
        return common | {
            "fan_in_fan_out": frozen.fan_in_fan_out,
            "feedforward_modules": [
                name
                for name in sorted(frozen.target_modules)
                if any(selects(name, module) for module in inputs)
            ],
            "peft_type": "IA3",
            "target_modules": sorted(frozen.target_modules),
        }
    return adapter_config(frozen, frozen.rank) | {"use_dora": True}
