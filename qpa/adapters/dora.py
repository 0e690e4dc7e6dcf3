"""DoRA: each row of W + (alpha / rank) B A is brought to a length that is trained.

The lengths are lora_magnitude_vector [out, 1], which start as the lengths of the base's rows.

Source: arXiv 2402.09353; names and shapes as in PEFT, which keeps the lengths as [out].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.experts import layers_beside_experts
from qpa.adapters.kind import Rates
from qpa.adapters.low_rank import LORA_A, LORA_B, LowRankKind, check_factors, lora_config, product
from qpa.adapters.peft_directory import (
    MODULE_FIELDS,
    Fields,
    PeftDirectory,
    check_names,
    is_count,
    is_one_of,
)
from qpa.compat.peft_ import CONFIG_FILE, KEY_PREFIX, dequantized_weight, module_parameter
from qpa.documents import AdapterSpec, AdapterTensor, FrozenAdapter, TensorRules
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, short
from qpa.documents.tensors import Role
from qpa.models.linear_layers import Layer, stores_transpose

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.parameter_view import AdapterParameter
    from qpa.adapters.weight_change import Blocks, WeightChange
    from qpa.store.tensor_file import Array, TensorFile

MAGNITUDES = Role("lora_magnitude_vector", "column", "base", has_rank=False)


def _check(shapes: Sequence[tuple[int, int]], rank: int) -> None:
    _, (n_out, _), (n_magnitudes, _) = shapes
    if n_out != n_magnitudes:
        raise ValueError(f"shapes {[*shapes]} are of several modules")
    check_factors(shapes, rank)


RULES = TensorRules(roles=(LORA_A, LORA_B, MAGNITUDES), check=_check, is_product=True)


@final
class _Directory(PeftDirectory):
    """A LoRA directory with use_dora, and lora_magnitude_vector [out] beside the factors of each module."""

    tag: ClassVar[str] = "dora"
    warning: ClassVar[str] = ", and transformers' `load_adapter` takes it without a word for something else"
    fields: ClassVar[Fields] = {
        **MODULE_FIELDS,
        "bias": is_one_of("none"),
        "lora_alpha": is_count,
        "lora_dropout": is_one_of(0.0),
        "peft_type": is_one_of("LORA"),
        "r": is_count,
        "use_dora": is_one_of(True),
        "use_rslora": is_one_of(False),
    }

    def config(self, frozen: FrozenAdapter) -> JsonObject:
        """Return LoRA's config with use_dora."""
        return lora_config(frozen, frozen.rank, use_dora=True)

    def shapes(self, frozen: FrozenAdapter) -> dict[str, tuple[int, ...]]:
        """Return the shapes; that of the magnitudes is [out]."""
        shapes = super().shapes(frozen)
        magnitudes = [tensor for tensor in frozen.tensors if tensor.role == MAGNITUDES.name]
        return shapes | {KEY_PREFIX + tensor.path: tensor.shape[:1] for tensor in magnitudes}

    def check(self, config: JsonObject, file: TensorFile) -> Iterator[Finding]:
        """Yield modules that lack a tensor or have one of another rank, and an alpha that is not the rank."""
        rank = config["r"]
        if config["lora_alpha"] != rank:
            yield Finding("L23", f"{CONFIG_FILE} lora_alpha", "r", short(config["lora_alpha"]))
            return
        shapes = {key: entry.shape for key, entry in file.entries.items()}
        ends = (".lora_A.weight", ".lora_B.weight", f".{MAGNITUDES.name}")
        modules = sorted(
            key.removeprefix(KEY_PREFIX).removesuffix(ends[2]) for key in shapes if key.endswith(ends[2])
        )
        wanted = {f"{KEY_PREFIX}{module}{end}" for module in modules for end in ends}
        yield from check_names(shapes, wanted, modules, config)
        for module in modules:
            a, b, m = (shapes.get(f"{KEY_PREFIX}{module}{end}", ()) for end in ends)
            if a[:1] != (rank,) or b != (*m, rank) or len(a) != 2 or len(m) != 1:
                found = f"{list(a)}, {list(b)}, {list(m)}"
                yield Finding("L24", short(module), f"[r, in], [out, r] and [out] with r {rank}", found)


@final
class Dora(LowRankKind):
    """DoRA: LoRA's factors, and lora_magnitude_vector [out, 1], in every module."""

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    rules: ClassVar[TensorRules] = RULES
    peft: ClassVar[PeftDirectory] = _Directory()
    formats: ClassVar[tuple[str, ...]] = ("peft", "merged", "onnx")
    direct_rates: ClassVar[Rates] = (3e-3, 1e-2, 3e-2)
    uses_dora: ClassVar[bool] = True

    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the linear layers, without those whose names PEFT takes for experts."""
        return layers_beside_experts(model)

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return the shapes of lora_A, lora_B and the magnitudes."""
        return (rank, layer.n_in), (layer.n_out, rank), (layer.n_out, 1)

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name of the parameter in PEFT."""
        return module_parameter(tensor.module, tensor.role)

    def part(self, parameter: Parameter, tensor: AdapterTensor, spec: AdapterSpec) -> AdapterParameter:
        """Return PEFT's magnitudes [out] as [out, 1], and any other parameter as a whole."""
        import torch

        from qpa.adapters.parameter_view import ParameterView

        if tensor.role == MAGNITUDES.name:
            return ParameterView(parameter, partial(torch.unsqueeze, dim=1))
        return parameter

    def values_of_base(self, wrapped: Any, spec: AdapterSpec) -> dict[str, Tensor]:
        """Return float32[out, 1], the lengths of the rows of every weight; PEFT rounds them to its type."""
        base = wrapped.get_base_model()
        return {
            tensor.path: _row_lengths(base.get_submodule(tensor.module).get_base_layer())
            for tensor in spec.tensors
            if tensor.role == MAGNITUDES.name
        }

    def weight_change(
        self, arrays: FrozenArrays, module: str, blocks: Blocks, *, transposed: bool
    ) -> WeightChange:
        """Return W + B A with its rows, or a transposed weight's columns, brought to the trained lengths.

        The blocks are read once, to measure the lengths that the rows have without that.
        """
        import numpy as np

        from qpa.adapters.weight_change import WeightChange

        change = product(arrays, module, transposed=transposed)
        magnitudes = arrays.read(arrays.of_module(module)[-1].path)
        lengths = _lengths(change, blocks, transposed=transposed)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = (magnitudes.ravel() / lengths).astype(np.float32)
        if transposed:
            return WeightChange(change.left, change.right, column_scale=scale[None])
        return WeightChange(change.left, change.right, row_scale=scale[:, None])


KIND = Dora()


def _row_lengths(layer: Any) -> Tensor:
    import torch

    with torch.no_grad():
        weight = dequantized_weight(layer).float()
        lengths: Tensor = torch.linalg.norm(weight, dim=0 if stores_transpose(layer) else 1)
        return lengths[:, None]


def _lengths(change: WeightChange, blocks: Blocks, *, transposed: bool) -> Array:
    """Return float64[out], the length of every output's row of the sum."""
    import numpy as np

    squares = []
    for rows, numbers in blocks():
        changed = change.summed(rows, numbers).astype(np.float64)
        squares.append(np.sum(changed * changed, axis=0 if transposed else 1))
    lengths: Array = np.sqrt(np.sum(squares, axis=0) if transposed else np.concatenate(squares))
    return lengths
