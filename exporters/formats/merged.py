"""merged: the base model's own checkpoint with the adapter added to its weights, for any engine.

Rules:
1. A weight becomes what the kind of adapter says (`qpa.adapters.weight_kind`), W + (alpha / rank) B A for
   LoRA, in float32, rounded once to the type that is written; IA3 changes biases too.
2. The checkpoint keeps the base's file names, tensor names and tensors. Floating-point tensors all become one
   type, which config.json then names; the others stay as they are.
3. Which tensor is which module's weight is asked of transformers, on a model without weights: it renames
   tensors when it loads them. A weight that it also converts, or shares between modules, is refused. Experts
   have a tensor each, or one for all of them.
4. One tensor at a time is in memory, with its copy in the new type and the adapter's tensors for it.
5. A number that was finite stays finite or is refused.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any, ClassVar, cast, final

import numpy as np

from qpa.adapters.experts import expert_layer, is_stacked
from qpa.adapters.frozen_arrays import SAFETENSORS_TYPE, FrozenArrays
from qpa.adapters.registry import KINDS
from qpa.adapters.weight_change import WeightChange
from qpa.adapters.weight_kind import WeightKind, weight_kind
from qpa.documents import FrozenAdapter
from qpa.documents.base import JsonObject
from qpa.errors import ExportError
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import BaseModelExporter
from qpa.models.base_checkpoint import (
    CONFIG_FILE,
    COPIED,
    INDEX_FILE,
    Checkpoint,
    base_directory,
    find_parameters,
    read_json,
)
from qpa.models.base_model import build_on_meta
from qpa.models.linear_layers import stores_transpose
from qpa.models.tied_weights import shares_weight
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import DTYPES, Array, TensorFile, TensorPlan

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_QUANTIZED = ("quantization_config", "compression_config")
_BLOCK = 1 << 18


@final
@dataclass(frozen=True, slots=True)
class ExportMerged(BaseModelExporter):
    """Write the base model with a frozen adapter merged into it.

    Args:    dtype: "float32", "bfloat16" or "float16", to which all floating-point tensors of the base are
             cast, whatever they are stored as: float32 doubles a bfloat16 base.
             model: where the base model is now; None for where the adapter says.
             trust_remote_code: the user allows the model's own Python code to run.
    Source:  ours.
    """

    name: ClassVar[str] = "merged"
    words: ClassVar[str] = "base model and adapter in one, for engines without LoRA"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE,)
    engines: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    merges: ClassVar[bool] = True
    carries_all: ClassVar[bool] = True

    def check(self, frozen: FrozenAdapter) -> None:
        """Refuse a tied head.

        Raises:  ExportError: the adapter is on a head that shares its weight with the input embedding.
        """
        if frozen.changes_tied_weight:
            place = frozen.embeddings[0] if frozen.embeddings else "the output head"
            raise _tied(f"{place} of {frozen.base.name_or_path}", frozen)

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write weights, config and the base's tokenizer files.

        Raises:  ModelError: the base is not there, or not the one the adapter was planned for.
                 ExportError: it is quantised, has no safetensors, or its weights do not fit the adapter.
        """
        arrays = FrozenArrays.open(frozen, context)
        base, model_config = self.base_and_config(frozen)
        folder = base_directory(base)
        config = read_json(folder / CONFIG_FILE)
        _check_not_quantized(config, folder, frozen)
        checkpoint = Checkpoint.open(folder)
        model = build_on_meta(model_config, base.name_or_path, trust_remote_code=base.trust_remote_code)
        merge = Merge.plan(arrays, checkpoint, model, self.dtype)
        _write_weights(merge, checkpoint, directory)
        directory.write_json(CONFIG_FILE, with_dtype(config, self.dtype))
        for file in _files_to_copy(folder, with_code=base.trust_remote_code):
            directory.copy(file.name, file)
        return frozen.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        trusts = frozen.base.trust_remote_code
        return {
            "code_argument": ", trust_remote_code=True" if trusts else "",
            "code_option": " --trust-remote-code" if trusts else "",
        }


@dataclass(frozen=True)
class Merge:
    """What becomes of each tensor of a checkpoint.

    Args:    weights, biases: adapted modules by the key of their weight, and of a bias that changes.
             stacks: the same layer of all experts, in order, by the key of the tensor that holds them as
             [n_experts, in, out].
             transposed: those of the modules that store [in, out].
             dtype: of all floating-point tensors that are written.
    """

    arrays: FrozenArrays
    weights: Mapping[str, str]
    biases: Mapping[str, str]
    stacks: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    dtype: str

    @classmethod
    def plan(cls, arrays: FrozenArrays, checkpoint: Checkpoint, model: Any, dtype: str) -> Merge:
        """Find the weight of every adapted module.

        Args:    model: the base model on torch's meta device.
        Raises:  ExportError: a weight is missing, there twice, shared with another module, converted when
                 the model is loaded, of another shape, or no floating-point tensor.
        """
        adapted = {*arrays.frozen.modules}
        stacks = _stacks(adapted, checkpoint, model)
        modules = sorted(adapted.difference(*stacks.values()))
        for module in modules:
            if shares_weight(model, module):
                raise _tied(module, arrays.frozen)
        kind, layers = weight_kind(arrays.frozen), {module: _submodule(model, module) for module in modules}
        weights = _by_key([f"{module}.weight" for module in modules], checkpoint, model)
        with_bias = [m for m, layer in layers.items() if getattr(layer, "bias", None) is not None]
        scaled = [module for module in with_bias if kind.bias_scale(arrays, module) is not None]
        biases = _by_key([f"{module}.bias" for module in scaled], checkpoint, model)
        transposed = {module for module, layer in layers.items() if stores_transpose(layer)}
        merge = cls(arrays, weights, biases, stacks, frozenset(transposed), dtype)
        for file in checkpoint.files.values():
            merge.check_file(file)
        return merge

    @property
    def kind(self) -> WeightKind:
        """Return the kind of adapter, which says how it changes a weight."""
        return weight_kind(self.arrays.frozen)

    def planned(self, file: TensorFile) -> Iterator[TensorPlan]:
        """Yield the tensors to be written in place of a file's."""
        kind = SAFETENSORS_TYPE[self.dtype]
        for key, entry in file.entries.items():
            yield TensorPlan(key, kind if entry.dtype in _FLOAT_TYPES else entry.dtype, entry.shape)

    def read(self, file: TensorFile, key: str) -> Array:
        """Return a tensor as it is to be written, merged where its module is adapted.

        Raises:  ExportError: a number becomes NaN or infinity.
        """
        source = file.read(key)
        target = DTYPES[SAFETENSORS_TYPE[self.dtype]]
        kept = file.entries[key].dtype not in _FLOAT_TYPES or source.dtype == target
        if kept and not self._is_changed(key):
            return source
        result = source if source.dtype == target else np.empty(source.shape, target)
        for part in range(len(source)) if key in self.stacks else (...,):
            self._write_part(key, source[part], result[part], part)
        return result

    def _is_changed(self, key: str) -> bool:
        return key in self.weights or key in self.biases or key in self.stacks

    def _write_part(self, key: str, source: Array, result: Array, part: int | EllipsisType) -> None:
        """Write a tensor, or an expert's part of it, as it is to be."""
        change = self._change(key, source, part)
        n_together = 1 if change is None else change.n_rows_together
        for rows, numbers in _blocks(source, n_together):
            changed = numbers if change is None else change.apply(key, rows, numbers)
            _matrix(result)[rows] = self._cast(key, changed)

    def _change(self, key: str, source: Array, part: int | EllipsisType) -> WeightChange | None:
        """Return what becomes of a tensor or an expert's part of it, None for one that no module adapts."""
        if key in self.biases:
            return WeightChange(column_scale=self.kind.bias_scale(self.arrays, self.biases[key]))
        module = self.weights.get(key) if isinstance(part, EllipsisType) else self.stacks[key][part]
        if module is None:
            return None
        is_transposed = key in self.stacks or module in self.transposed
        blocks = partial(_blocks, source)
        return self.kind.weight_change(self.arrays, module, blocks, transposed=is_transposed)

    def _cast(self, key: str, numbers: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            result = numbers.astype(DTYPES[SAFETENSORS_TYPE[self.dtype]], copy=False)
        lost = np.isfinite(numbers) & ~np.isfinite(result)
        if lost.any():
            found = f"one too large: {np.abs(numbers[lost]).max():.1e}"
            advice = "use float32" if self.dtype == "bfloat16" else "use bfloat16 or float32"
            raise ExportError(key, f"finite {self.dtype} numbers", found, advice)
        return result

    def check_file(self, file: TensorFile) -> None:
        """Check that the tensors of a file can be read, and that the adapted ones fit the adapter.

        Raises:  ExportError: one cannot be read, or has another shape or type.
        """
        for key, entry in file.entries.items():
            if entry.dtype not in DTYPES:
                raise ExportError(f"{key} in {file.path}", f"a type among {', '.join(DTYPES)}", entry.dtype)
            if not self._is_changed(key):
                continue
            expected = self._shape(key)
            fits = len(entry.shape) == len(expected) and all(
                side in (None, n) for side, n in zip(expected, entry.shape, strict=True)
            )
            if not fits or entry.dtype not in _FLOAT_TYPES:
                sides = ", ".join("any" if side is None else str(side) for side in expected)
                found = f"{entry.dtype}{list(entry.shape)}"
                raise ExportError(f"{key} in {file.path}", f"floating-point numbers[{sides}]", found)

    def _shape(self, key: str) -> list[int | None]:
        """Return the shape a tensor must have; None is a side that the adapter leaves open."""
        if key in self.biases:
            return [self.kind.sides(self.arrays, self.biases[key])[0]]
        if key in self.stacks:
            modules = self.stacks[key]
            return [len(modules), *self.kind.sides(self.arrays, modules[0])[::-1]]
        module = self.weights[key]
        sides = [*self.kind.sides(self.arrays, module)]
        return sides[::-1] if module in self.transposed else sides


def with_dtype(config: JsonObject, dtype: str) -> JsonObject:
    """Return a config that names this type at its top, and wherever it names another one."""
    renamed = cast(JsonObject, _with_dtype(config, dtype))
    return renamed if "torch_dtype" in renamed else renamed | {"dtype": dtype}


def _with_dtype(value: Any, dtype: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _with_dtype(item, dtype)
        for key, item in value.items()
    }


def _write_weights(merge: Merge, checkpoint: Checkpoint, directory: ExportDirectory) -> None:
    n_bytes = 0
    for name, file in checkpoint.files.items():
        plans = list(merge.planned(file))
        n_bytes += sum(plan.n_bytes for plan in plans)
        directory.write_tensors(name, plans, partial(merge.read, file), {"format": "pt"})
    if checkpoint.index is not None:
        metadata = checkpoint.index.get("metadata")
        known = metadata if isinstance(metadata, dict) else {}
        index = {"metadata": known | {"total_size": n_bytes}, "weight_map": checkpoint.places()}
        directory.write_json(INDEX_FILE, index)


def _by_key(names: Sequence[str], checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Return the module of each of the given parameters, by the parameter's key in the checkpoint."""
    fused = {name for name in names if expert_layer(name.rpartition(".")[0]) is not None}
    keys = find_parameters(names, checkpoint.places(), model, fused=fused)
    return {key: name.rpartition(".")[0] for name, key in keys.items()}


def _stacks(modules: Collection[str], checkpoint: Checkpoint, model: Any) -> dict[str, tuple[str, ...]]:
    """Return the same layer of all experts, in order, by the key of the tensor that holds them."""
    by_parameter: dict[str, list[tuple[int, str]]] = {}
    for module in modules:
        expert = expert_layer(module)
        if expert is not None and is_stacked(expert, modules):
            by_parameter.setdefault(expert.parameter, []).append((expert.index, module))
    keys = find_parameters(by_parameter, checkpoint.places(), model)
    return {keys[name]: tuple(module for _, module in sorted(pairs)) for name, pairs in by_parameter.items()}


def _submodule(model: Any, module: str) -> Any:
    """Return a module; None for an expert's layer, which is a part of a fused parameter."""
    return None if expert_layer(module) is not None else model.get_submodule(module)


def _tied(subject: str, frozen: FrozenAdapter) -> ExportError:
    return ExportError(
        subject,
        "a weight of its own to merge into",
        "one shared between the input embedding and the output head, which both would change",
        f"choose targets without the head and the embedding, or use `format` {_plainest(frozen)} "
        "`allow_tied_head`",
    )


def _plainest(frozen: FrozenAdapter) -> str:
    """Return the format that carries the adapter by itself, without the base model's weights."""
    return KINDS[frozen.method].formats[0]


def _check_not_quantized(config: JsonObject, folder: Path, frozen: FrozenAdapter) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any(part.get(name) for part in parts for name in _QUANTIZED):
        expected, advice = "a base model that is not quantised", f"use `format` {_plainest(frozen)}"
        raise ExportError(str(folder / CONFIG_FILE), expected, "one that is", advice)


def _blocks(source: Array, n_together: int = 1) -> Iterator[tuple[slice, Array]]:
    """Yield the rows of a tensor of any shape as matrices of at most `_BLOCK` numbers.

    Args:    n_together: the number of rows is a multiple of it, however many numbers these have.
    """
    matrix = _matrix(source)
    n_rows = max(1, _BLOCK // max(1, n_together * matrix.shape[1])) * n_together
    for start in range(0, len(matrix), n_rows):
        rows = slice(start, start + n_rows)
        yield rows, matrix[rows]


def _matrix(array: Array) -> Array:
    """Return a contiguous array's own numbers, [.., n_columns], as [n_rows, n_columns]."""
    n_columns = array.shape[-1] if array.ndim else 1
    return array.reshape(array.size // max(1, n_columns), n_columns)


def _files_to_copy(folder: Path, *, with_code: bool) -> Iterator[Path]:
    """Yield what belongs to a model besides weights and config, in order."""
    patterns = (*COPIED, "*.py") if with_code else COPIED
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in patterns):
            yield file
