"""LoRA: W + (alpha / rank) B A, on linear layers, on the embedding of the tokens, and on fused experts.

Source: arXiv 2106.09685; names and shapes as in PEFT.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters import embedding, experts
from qpa.adapters.low_rank import LORA_A, LORA_B, LowRankKind, check_factors, product
from qpa.compat.peft_ import module_parameter
from qpa.documents import AdapterSpec, AdapterTensor, TensorRules
from qpa.models.linear_layers import Layer, input_embedding, last_component, linear_layers

if TYPE_CHECKING:
    from torch.nn import Parameter

    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.parameter_view import AdapterParameter
    from qpa.adapters.weight_change import Blocks, WeightChange

RULES = TensorRules(
    roles=(LORA_A, LORA_B), check=check_factors, roles_of_embedding=embedding.ROLES, is_product=True
)


@final
class Lora(LowRankKind):
    """LoRA: lora_A [rank, in] and lora_B [out, rank] in every module."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    rules: ClassVar[TensorRules] = RULES
    formats: ClassVar[tuple[str, ...]] = (
        *("lora", "merged", "onnx", "onnx-adapter", "genai", "gguf", "mlx", "compact"),
    )
    uses_dora: ClassVar[bool] = False

    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the embedding of the tokens, the linear layers, and the layers of fused experts."""
        return {**input_embedding(model), **linear_layers(model), **experts.expert_layers(model)}

    def weights_of(self, model: Any) -> dict[str, str]:
        """Return stacked experts, and layers with a name that PEFT takes for experts."""
        taken = experts.names_of_other_layers(model)
        weights = {path: f"{path}.weight" for path in linear_layers(model) if last_component(path) in taken}
        layers = experts.expert_layers(model)
        for path in layers:
            expert = experts.expert_layer(path)
            if expert is not None and experts.is_stacked(expert, layers):
                weights[path] = expert.parameter
        return weights

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return the shapes of lora_A and lora_B, or of an embedding's two factors."""
        return (rank, layer.n_in), (layer.n_out, rank)

    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a `peft.PeftModel`, in which fused experts do not mix their layers."""
        wrapped = super().wrap(model, spec)
        experts.keep_unmixed(wrapped, spec)
        return wrapped

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name of the parameter in PEFT."""
        if (expert := experts.expert_layer(tensor.module)) is not None:
            return experts.parameter_name(tensor, expert, modules)
        is_module = tensor.role not in embedding.NAMES
        return module_parameter(tensor.module, tensor.role, is_module=is_module)

    def part(self, parameter: Parameter, tensor: AdapterTensor, spec: AdapterSpec) -> AdapterParameter:
        """Return an expert's part of the parameter of all experts, and any other parameter as a whole."""
        if (expert := experts.expert_layer(tensor.module)) is not None:
            return experts.parameter_part(parameter, tensor.role, expert, spec.rank)
        return parameter

    def weight_change(
        self, arrays: FrozenArrays, module: str, blocks: Blocks, *, transposed: bool
    ) -> WeightChange:
        """Return W + B A."""
        return product(arrays, module, transposed=transposed)


KIND = Lora()
