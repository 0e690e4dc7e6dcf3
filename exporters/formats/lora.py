"""lora: a LoRA directory in the form that every serving engine reads alike.

Rules:
1. lora_alpha == r: the scaling alpha / r is multiplied into lora_B (`qpa.adapters.frozen_arrays`).
2. Tensors are named base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r], of an
   embedding .lora_embedding_A and .lora_embedding_B, of one type, contiguous; target_modules is an explicit
   sorted list. One tensor is of all stacked experts: lora_A [n_experts * r, in], lora_B [out, r * n_experts].
3. One tensor at a time is in memory.
4. An adapter on a basis names the base model as the basis does, wherever it lay for the plan: `qpa expand`,
   which knows the basis alone, writes the same bytes.
5. The result keeps `qpa.exporters.contracts.lora`.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.adapters.experts import stacks
from qpa.adapters.frozen_arrays import SAFETENSORS_TYPE, FrozenArrays
from qpa.adapters.low_rank import lora_config
from qpa.compat.peft_ import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from qpa.documents import AdapterSpec, FrozenAdapter, Manifest, TensorRef
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding
from qpa.errors import ExportError
from qpa.exporters.cards.model_card import loading_in_vllm
from qpa.exporters.contracts.lora import check_lora_contract
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import Exporter, dtype_option
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import Array, TensorPlan


def tied_head_option() -> Any:
    """Declare the field `allow_tied_head` of an exporter."""
    return option(False, help="Export an adapter on a tied output head; right unmerged, but wrong merged.")


@final
@dataclass(frozen=True, slots=True)
class ExportLora(Exporter):
    """Write a frozen adapter as a LoRA directory.

    Args:    dtype: of the tensors: "float32", "bfloat16" or "float16".
             rank_pad: pad the rank with zeros to a multiple of this.
             allow_tied_head: export an adapter on an output head that shares its weight with the input
             embedding, although an engine that merges it then computes something else.
    Source:  ours.
    """

    name: ClassVar[str] = "lora"
    words: ClassVar[str] = "for PEFT, transformers and vLLM"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE)
    engines: ClassVar[tuple[str, ...]] = ("peft", "transformers", "vllm")
    any_origin: ClassVar[bool] = True
    carries_all: ClassVar[bool] = True

    dtype: str = dtype_option()
    rank_pad: int = option(1, help="Pad the rank with zeros to a multiple of this.", at_least=1)
    allow_tied_head: bool = tied_head_option()

    @classmethod
    def findings(cls, directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
        """Return what the directory breaks of the contract for a LoRA of any origin."""
        return check_lora_contract(directory)

    def check(self, frozen: FrozenAdapter) -> None:
        """Refuse a tied head, or its embedding.

        Raises:  ExportError: the adapter is on one, and it was not allowed.
        """
        if not self.allow_tied_head:
            refuse_tied(frozen)

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write config and weights."""
        arrays = FrozenArrays.open(frozen, context, dtype=self.dtype, rank_pad=self.rank_pad)
        kind = SAFETENSORS_TYPE[self.dtype]
        stacked = stacks(frozen.tensors)
        shapes = {path: _stacked_shape(arrays, tensors) for path, tensors in stacked.items()}
        alone = {*frozen.tensors}.difference(*stacked.values())
        shapes |= {tensor.path: arrays.shape(tensor) for tensor in frozen.tensors if tensor in alone}

        def read(name: str) -> Array:
            path = name.removeprefix(KEY_PREFIX)
            return _stack(arrays, stacked[path]) if path in stacked else arrays.read(path)

        plans = [TensorPlan(KEY_PREFIX + path, kind, shape) for path, shape in shapes.items()]
        directory.write_tensors(WEIGHTS_FILE, plans, read, {"format": "pt"})
        config = lora_config(frozen, arrays.rank, use_dora=False)
        directory.write_json(CONFIG_FILE, config | _name_of_basis(context))
        return arrays.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        return {"vllm": loading_in_vllm(frozen, rank)}


def _name_of_basis(context: PassContext) -> JsonObject:
    """Return the fields of adapter_config.json that name the base model; none where there is no basis."""
    specs = [document for document in context.documents if isinstance(document, AdapterSpec)]
    if not specs or specs[-1].basis is None:
        return {}
    basis = specs[-1].basis
    return {"base_model_name_or_path": basis.base, "revision": basis.revision}


def _stacked_shape(arrays: FrozenArrays, tensors: Sequence[TensorRef]) -> tuple[int, int]:
    n_rows, n_columns = arrays.shape(tensors[0])
    n = len(tensors)
    return (n * n_rows, n_columns) if tensors[0].axis == "row" else (n_rows, n_columns * n)


def _stack(arrays: FrozenArrays, tensors: Sequence[TensorRef]) -> Array:
    """Return the tensors of all experts as PEFT's one: rows expert by expert, columns rank by rank."""
    import numpy as np

    parts = [arrays.read(tensor.path) for tensor in tensors]
    if tensors[0].axis == "row":
        return np.concatenate(parts)
    return np.stack(parts, axis=-1).reshape(len(parts[0]), -1)


def refuse_tied(frozen: FrozenAdapter) -> None:
    """Refuse an adapter on a head or embedding that share their weight.

    Raises:  ExportError: it is on one.
    """
    if frozen.changes_tied_weight:
        place = frozen.embeddings[0] if frozen.embeddings else "the output head"
        raise ExportError(
            f"{place} of {frozen.base.name_or_path}",
            "a weight of its own",
            "one that embedding and output head share, so what merges the adapter gives wrong tokens",
            "choose targets without the head and the embedding, or pass `allow_tied_head`",
        )
