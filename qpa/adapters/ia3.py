"""IA3: ia3_l scales the output of a module, or the input of the second layer of a feed-forward block.

ia3_l is [out, 1] where it scales outputs, and so the bias, and [1, in] where it scales inputs. It starts
at one.

Source: arXiv 2205.05638; names and shapes as in PEFT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.kind import Rates
from qpa.adapters.peft_directory import (
    MODULE_FIELDS,
    Fields,
    PeftDirectory,
    are_names,
    check_names,
    common_config,
    is_one_of,
)
from qpa.adapters.weight_kind import PeftWeightKind
from qpa.compat.peft_ import KEY_PREFIX, module_parameter
from qpa.documents import AdapterSpec, AdapterTensor, FrozenAdapter, TensorRef, TensorRules
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, short
from qpa.documents.tensors import Role
from qpa.models.linear_layers import Layer, is_selected, linear_layers, selects, shortest_names

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.weight_change import Blocks, WeightChange
    from qpa.store.tensor_file import Array, TensorFile

FEED_FORWARD_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "w2", "fc_out")
"""The second layers of feed-forward blocks, of which IA3 scales the input."""

SCALES = Role("ia3_l", None, "ones", has_rank=False)


def _any_shape(shapes: Sequence[tuple[int, int]], rank: int) -> None:
    """Accept a single vector of any length."""


RULES = TensorRules(roles=(SCALES,), check=_any_shape)


@final
class _Directory(PeftDirectory):
    """One ia3_l in every module: [1, in] where feedforward_modules selects it, and [out, 1] elsewhere."""

    tag: ClassVar[str] = "ia3"
    fields: ClassVar[Fields] = {
        **MODULE_FIELDS,
        "feedforward_modules": are_names,
        "peft_type": is_one_of("IA3"),
    }

    def config(self, frozen: FrozenAdapter) -> JsonObject:
        """Return the config, with the modules whose inputs are scaled as feedforward_modules."""
        targets = sorted(frozen.target_modules)
        return common_config(frozen) | {
            "fan_in_fan_out": frozen.fan_in_fan_out,
            "feedforward_modules": names_of_inputs(targets, frozen.tensors),
            "peft_type": "IA3",
            "target_modules": targets,
        }

    def check(self, config: JsonObject, file: TensorFile) -> Iterator[Finding]:
        """Yield modules whose ia3_l is missing, or scales another side than the config says."""
        end = f".{SCALES.name}"
        shapes = {
            key.removeprefix(KEY_PREFIX).removesuffix(end): entry.shape for key, entry in file.entries.items()
        }
        wanted = {f"{KEY_PREFIX}{module}{end}" for module in shapes}
        yield from check_names(file.entries, wanted, shapes, config)
        inputs = config["feedforward_modules"]
        assert isinstance(inputs, list)
        for module, shape in sorted(shapes.items()):
            scales_input = is_selected(module, inputs)
            if len(shape) != 2 or shape[0 if scales_input else 1] != 1:
                expected = "[1, in]" if scales_input else "[out, 1]"
                yield Finding("L24", short(module), expected, str(list(shape)))


@final
class Ia3(PeftWeightKind):
    """IA3: one vector of scales in every module."""

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "IA3"
    rules: ClassVar[TensorRules] = RULES
    default_rank: ClassVar[int] = 1
    has_rank: ClassVar[bool] = False
    default_targets: ClassVar[tuple[str, ...]] = (
        *("k_proj", "v_proj", "key", "value", "c_attn", "query_key_value", "qkv_proj"),
        *FEED_FORWARD_OUTPUTS,
    )
    peft: ClassVar[PeftDirectory] = _Directory()
    formats: ClassVar[tuple[str, ...]] = ("peft", "merged", "onnx")
    rate: ClassVar[float] = 1e-1
    direct_rates: ClassVar[Rates] = (3e-2, 1e-1, 3e-1)
    generated_rates: ClassVar[Rates] = (1e-2, 3e-2, 1e-1)

    def words(self, rank: int) -> str:
        """Return "IA3", which comes in one size."""
        return self.title

    def phrase(self, rank: int) -> str:
        """Return "an IA3"."""
        return f"an {self.title}"

    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the linear layers."""
        return linear_layers(model)

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return [1, in] for scales of inputs, [out, 1] for scales of outputs."""
        return ((1, layer.n_in) if is_selected(path, FEED_FORWARD_OUTPUTS) else (layer.n_out, 1),)

    def names_of(self, chosen: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
        """Return names that tell modules whose outputs are scaled from those whose inputs are."""
        inputs = [path for path in chosen if is_selected(path, FEED_FORWARD_OUTPUTS)]
        outputs = [path for path in chosen if path not in inputs]
        return shortest_names(outputs, paths) + shortest_names(inputs, paths)

    def peft_config(self, spec: AdapterSpec) -> Any:
        """Return a `peft.IA3Config`."""
        from peft import IA3Config

        return IA3Config(
            target_modules=list(spec.target_modules),
            feedforward_modules=names_of_inputs(spec.target_modules, spec.tensors),
            fan_in_fan_out=spec.fan_in_fan_out,
            task_type="CAUSAL_LM",
        )

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name of the parameter in PEFT."""
        return module_parameter(tensor.module, tensor.role, is_module=False)

    def sides(self, arrays: FrozenArrays, module: str) -> tuple[int | None, int | None]:
        """Return the side of a module that is scaled, and None for the other."""
        (scales,) = arrays.of_module(module)
        n_out, n_in = scales.shape
        return (None, n_in) if scales.axis == "row" else (n_out, None)

    def weight_change(
        self, arrays: FrozenArrays, module: str, blocks: Blocks, *, transposed: bool
    ) -> WeightChange:
        """Return W with the rows of its outputs, or the columns of its inputs, scaled."""
        from qpa.adapters.weight_change import WeightChange

        (tensor,) = arrays.of_module(module)
        scale = arrays.read(tensor.path)
        if (tensor.axis == "row") == transposed:
            return WeightChange(row_scale=scale.reshape(-1, 1))
        return WeightChange(column_scale=scale.reshape(1, -1))

    def bias_scale(self, arrays: FrozenArrays, module: str) -> Array | None:
        """Return the scales of a module's outputs, which scale its bias too; None where inputs are scaled."""
        (tensor,) = arrays.of_module(module)
        scale: Array = arrays.read(tensor.path)
        return None if tensor.axis == "row" else scale.ravel()


KIND = Ia3()


def names_of_inputs(names: Collection[str], tensors: Collection[TensorRef]) -> list[str]:
    """Return those of some names that select a module whose inputs are scaled."""
    modules = [tensor.module for tensor in tensors if tensor.axis == "row"]
    return [name for name in names if any(selects(name, module) for module in modules)]
