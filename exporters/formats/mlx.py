"""mlx: a LoRA adapter that mlx-lm loads with `load(model, adapter_path=...)`, for Apple silicon.

Rules:
1. adapters.safetensors holds <module>.lora_a [in, r] and <module>.lora_b [r, out]: PEFT's, transposed.
2. adapter_config.json names the modules by their paths inside a layer, and counts the layers from the last:
   the adapted modules must be the same in each of those layers. A head is named by its own path.
3. The scale is 1: the scaling is in lora_b.
4. Only architectures whose modules mlx-lm names as transformers does: another name would be refused by newer
   versions of mlx-lm, and ignored by older ones.
5. One tensor at a time is in memory.

Source:  ours; files and keys as in mlx-lm's mlx_lm/tuner/utils.py and lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from qpa.adapters.frozen_arrays import SAFETENSORS_TYPE, FrozenArrays
from qpa.documents import FrozenAdapter
from qpa.errors import ExportError
from qpa.exporters.cards.model_card import targets_head
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import OtherNamesExporter
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import Array, TensorPlan

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
)
"""Architectures that mlx-lm has, with the module paths of transformers."""

WITHOUT_HEAD = ("GemmaForCausalLM", "Gemma2ForCausalLM")
"""Architectures of which mlx-lm always ties the head to the input embedding."""

_ROLES = {"lora_A": "lora_a", "lora_B": "lora_b"}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@final
@dataclass(frozen=True, slots=True)
class ExportMlx(OtherNamesExporter):
    """Write a frozen adapter as mlx-lm's own trainer does.

    Args:    dtype: of the tensors: "float32", "bfloat16" or "float16".
             model: where the base model is now; None for where the adapter says. Only its config is read.
             trust_remote_code: the user allows the model's own Python code to run.
    Source:  ours.
    """

    name: ClassVar[str] = "mlx"
    words: ClassVar[str] = "a LoRA for mlx-lm"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE)
    engines: ClassVar[tuple[str, ...]] = ("mlx",)
    architectures: ClassVar[Collection[str]] = ARCHITECTURES
    headless: ClassVar[Collection[str]] = WITHOUT_HEAD
    no_conv1d: ClassVar[str] = "for which mlx-lm has other modules"
    no_tied_head: ClassVar[str] = "mlx-lm has no module"

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write weights and config.

        Raises:  ModelError: the base is not there, or not the one the adapter was planned for.
                 ExportError: mlx-lm cannot express which modules are adapted.
        """
        arrays = FrozenArrays.open(frozen, context, dtype=self.dtype)
        _, base_config = self.base_and_config(frozen)
        config = adapter_config(frozen, base_config.num_hidden_layers)
        _write_weights(arrays, directory)
        directory.write_json(CONFIG_FILE, config)
        return frozen.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        base = frozen.base
        revision = f", revision={json.dumps(base.revision)}" if base.revision else ""
        return {"base_name": json.dumps(base.name_or_path), "revision_argument": revision}


def adapter_config(frozen: FrozenAdapter, n_layers: int) -> dict[str, object]:
    """Return the content of adapter_config.json.

    Raises:  ExportError: mlx-lm cannot express which modules are adapted.
    """
    head = {frozen.base.head} if targets_head(frozen) else set()
    n_adapted, keys = keys_in_layers(sorted({*frozen.modules} - head), n_layers)
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": sorted({*keys, *(str(name) for name in head)}),
            "rank": frozen.rank,
            "scale": 1.0,
        },
        "num_layers": n_adapted,
    }


def keys_in_layers(modules: Iterable[str], n_layers: int) -> tuple[int, frozenset[str]]:
    """Return how many layers, counted from the last, have which adapted modules.

    Args:    modules: paths in the model, "model.layers.0.self_attn.q_proj".
    Returns: 0 and no key when there are no modules; mlx-lm then goes through all layers and finds none.
    Raises:  ExportError: a module outside the layers, or layers that differ.
    """
    keys: list[set[str]] = [set() for _ in range(n_layers)]
    for module in modules:
        match = _IN_LAYER.fullmatch(module)
        if match is None or int(match[1]) >= n_layers:
            raise ExportError(
                module, f"a module in one of {n_layers} layers", "one outside", "use `format` merged"
            )
        keys[int(match[1])].add(match[2])
    first = next((i for i in range(n_layers) if keys[i]), n_layers)
    for i in range(first, n_layers):
        if different := sorted(keys[i] ^ keys[first]):
            expected = f"the same adapted modules in every layer from layer {first} on, as mlx-lm has it"
            found = f"{different[0]} in one of them only"
            raise ExportError(f"layer {i}", expected, found, "use `format` lora or merged")
    return n_layers - first, frozenset(keys[first] if first < n_layers else ())


def _write_weights(arrays: FrozenArrays, directory: ExportDirectory) -> None:
    kind = SAFETENSORS_TYPE[arrays.dtype]
    paths, plans = {}, []
    for tensor in arrays.frozen.tensors:
        name = f"{tensor.module}.{_ROLES[tensor.role]}"
        paths[name] = tensor.path
        plans.append(TensorPlan(name, kind, arrays.shape(tensor)[::-1]))

    def read(name: str) -> Array:
        return np.ascontiguousarray(arrays.read(paths[name]).T)

    directory.write_tensors(WEIGHTS_FILE, plans, read, {"format": "mlx"})
