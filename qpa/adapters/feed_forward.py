"""The feed-forward adapter: h + up(gelu(down(h))) behind a block of the base model that returns h.

The QPA paper names this kind and does not give its form. PEFT has none, so the model is ours
(`qpa.adapters.feed_forward_model`). ffa_up starts at zero, so the model starts as the base.

Source: arXiv 1902.00751; the place behind the feed-forward block alone is that of arXiv 2005.00247.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.kind import Rates
from qpa.adapters.module_kind import ModuleKind
from qpa.documents import AdapterSpec, AdapterTensor, TensorRules
from qpa.documents.tensors import Role
from qpa.models.linear_layers import Layer, blocks

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays

DOWN = Role("ffa_down", "row", "kaiming_uniform", is_weight=True)
UP = Role("ffa_up", "column", is_weight=True)


def _check(shapes: Sequence[tuple[int, int]], rank: int) -> None:
    (_, n_in), (n_out, _) = shapes
    if n_in != n_out:
        raise ValueError(f"shapes {[*shapes]} are of several modules")


RULES = TensorRules(roles=(DOWN, UP), check=_check)


@final
class FeedForward(ModuleKind):
    """The feed-forward adapter: ffa_down [width, hidden] and ffa_up [hidden, width] behind every block."""

    name: ClassVar[str] = "ffa"
    title: ClassVar[str] = "feed-forward adapter"
    rules: ClassVar[TensorRules] = RULES
    default_rank: ClassVar[int] = 16
    default_targets: ClassVar[tuple[str, ...]] = ("mlp", "feed_forward", "ffn", "fc2")
    has_one_default: ClassVar[bool] = True
    takes_words: ClassVar[bool] = False
    candidate_words: ClassVar[str] = "blocks with linear layers in the layers"
    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    rate: ClassVar[float] = 3e-2
    direct_rates: ClassVar[Rates] = (1e-2, 3e-2, 1e-1)
    generated_rates: ClassVar[Rates] = (3e-3, 1e-2, 3e-2)

    def words(self, rank: int) -> str:
        """Return "feed-forward adapter of width 16"."""
        return f"{self.title} of width {rank}"

    def phrase(self, rank: int) -> str:
        """Return "a feed-forward adapter of width 16 behind every block"."""
        return f"a {self.title} of width {rank} behind every block"

    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the blocks of the layers."""
        return blocks(model)

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return the shapes of ffa_down and ffa_up, which both meet what the block returns."""
        return (rank, layer.n_out), (layer.n_out, rank)

    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a `FeedForwardModel`."""
        from qpa.adapters.feed_forward_model import FeedForwardModel

        return FeedForwardModel(model, spec.tensors)

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name in a `FeedForwardModel`."""
        return f"model.{tensor.path}"

    def put_into(self, model: Any, arrays: FrozenArrays) -> None:
        """Hang the adapter behind its blocks."""
        import torch

        from qpa.adapters.feed_forward_model import FeedForwardModel

        FeedForwardModel(model, arrays.frozen.tensors)
        with torch.no_grad():
            for tensor in arrays.frozen.tensors:
                model.get_parameter(tensor.path).copy_(torch.from_numpy(arrays.read(tensor.path)))


KIND = FeedForward()
