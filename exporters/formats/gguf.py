"""gguf: a LoRA adapter in one GGUF file, for llama.cpp and the engines that are built on it.

Rules:
1. Tensors are named <tensor of the base's GGUF>.lora_a [r, in] and .lora_b [out, r], as numpy counts the
   sides; ggml counts them from the last.
2. adapter.lora.alpha is the rank: the scaling is in lora_b.
3. Where llama.cpp's conversion reorders the rows of q_proj and k_proj, from the halves of a head that rotate
   with each other to neighbouring pairs, the rows of lora_b are reordered likewise.
4. One tensor at a time is in memory.

Source:  ours; names, keys and shapes as in llama.cpp's src/llama-adapter.cpp, rule 3 as in its
         conversion/llama.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from qpa.adapters.frozen_arrays import SAFETENSORS_TYPE, FrozenArrays
from qpa.documents import FrozenAdapter, TensorRef
from qpa.errors import ExportError
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import OtherNamesExporter
from qpa.models.linear_layers import last_component
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.disk_space import room_for
from qpa.store.tensor_file import DTYPES, Array

if TYPE_CHECKING:
    from gguf import GGUFWriter

WEIGHTS_FILE = "adapter.gguf"

ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
    "Phi3ForCausalLM": "PHI3",
}
"""gguf's name (a member of `MODEL_ARCH`) of each of transformers' architectures that can be exported."""

ROTATES_PAIRS = frozenset({"LLAMA"})
"""Architectures whose conversion reorders the rows of q_proj and k_proj."""

_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
}
"""gguf's names of the type of a tensor (`GGMLQuantizationType`) and of a file (`LlamaFileType`)."""
_ROLES = {"lora_A": "lora_a", "lora_B": "lora_b"}


@final
@dataclass(frozen=True, slots=True)
class ExportGguf(OtherNamesExporter):
    """Write a frozen adapter as a GGUF file.

    Args:    dtype: of the tensors: "float32", "bfloat16" or "float16".
             model: where the base model is now; None for where the adapter says. Only its config is read.
             trust_remote_code: the user allows the model's own Python code to run.
    Source:  ours.
    """

    name: ClassVar[str] = "gguf"
    words: ClassVar[str] = "a LoRA for llama.cpp"
    files: ClassVar[tuple[str, ...]] = (WEIGHTS_FILE,)
    engines: ClassVar[tuple[str, ...]] = ("llama.cpp",)
    architectures: ClassVar[Collection[str]] = ARCHITECTURES
    no_conv1d: ClassVar[str] = "whose weight llama.cpp stores the other way round"
    no_tied_head: ClassVar[str] = "llama.cpp has no tensor"

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write the GGUF file.

        Raises:  ModelError: the base is not there, or not the one the adapter was planned for.
                 ExportError: GGUF has no tensor for a module.
        """
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

        arrays = FrozenArrays.open(frozen, context, dtype=self.dtype)
        base, config = self.base_and_config(frozen)
        architecture = ARCHITECTURES[base.architecture]
        names = gguf_names(frozen, architecture, config.num_hidden_layers)
        n_heads = rotated_heads(config) if architecture in ROTATES_PAIRS else {}
        path = directory.path / WEIGHTS_FILE
        with (
            room_for(path, sum(_n_bytes(arrays, tensor) for tensor in frozen.tensors)),
            closing(GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH[architecture]])) as writer,
        ):
            _describe(writer, arrays, names)
            for tensor in frozen.tensors:
                writer.write_tensor_data(_reordered(arrays.read(tensor.path), tensor, n_heads))
        directory.take(WEIGHTS_FILE)
        return frozen.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        base = frozen.base
        return {"base_folder": shlex.quote(base.name_or_path) if base.local else "path/to/the/base/model"}


def gguf_names(frozen: FrozenAdapter, architecture: str, n_layers: int) -> dict[str, str]:
    """Return the name in the GGUF file of every tensor, by its path.

    Args:    architecture: a value of `ARCHITECTURES`.
    Raises:  ExportError: the architecture has no tensor for a module.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    member = MODEL_ARCH[architecture]
    known = get_tensor_name_map(member, n_layers)
    names = {}
    for tensor in frozen.tensors:
        name = known.get_name(tensor.module)
        if name is None:
            expected = f"a layer that GGUF has a tensor for in {MODEL_ARCH_NAMES[member]} models"
            raise ExportError(tensor.module, expected, "none", "use `format` merged")
        names[tensor.path] = f"{name}.weight.{_ROLES[tensor.role]}"
    return names


def rotated_heads(config: Any) -> dict[str, int]:
    """Return the number of heads of the layers that are rotated, by the last part of their path."""
    n_heads = config.num_attention_heads
    return {"q_proj": n_heads, "k_proj": getattr(config, "num_key_value_heads", None) or n_heads}


def rows_in_pairs(rows: Array, n_heads: int) -> Array:
    """Reorder rows so that those that rotate with each other are neighbours, head by head.

    Args:    rows: [n_heads * head_size, n]; rows i and i + head_size / 2 of a head are a pair.
    Returns: the same shape; rows 2 i and 2 i + 1 of a head are that pair.
    Source:  `permute` in llama.cpp's conversion/llama.py.
    """
    halves = rows.reshape(n_heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _reordered(array: Array, tensor: TensorRef, n_heads: Mapping[str, int]) -> Array:
    name = last_component(tensor.module)
    return rows_in_pairs(array, n_heads[name]) if tensor.role == "lora_B" and name in n_heads else array


def _describe(writer: GGUFWriter, arrays: FrozenArrays, names: Mapping[str, str]) -> None:
    """Write everything that stands before the numbers."""
    from gguf import GGMLQuantizationType, GGUFType, Keys, LlamaFileType

    kind, file_type = _TYPES[arrays.dtype]
    dtype = DTYPES[SAFETENSORS_TYPE[arrays.dtype]]
    writer.add_type(GGUFType.ADAPTER)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(arrays.rank))
    for tensor in arrays.frozen.tensors:
        n_bytes = _n_bytes(arrays, tensor)
        writer.add_tensor_info(
            names[tensor.path], arrays.shape(tensor), dtype, n_bytes, raw_dtype=GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _n_bytes(arrays: FrozenArrays, tensor: TensorRef) -> int:
    rows, columns = arrays.shape(tensor)
    return rows * columns * DTYPES[SAFETENSORS_TYPE[arrays.dtype]].itemsize
