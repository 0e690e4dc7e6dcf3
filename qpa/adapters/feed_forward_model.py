"""A base model with feed-forward adapters: behind a block that returns h comes h + up(gelu(down(h))).

Source: arXiv 1902.00751; the place behind the feed-forward block alone is that of arXiv 2005.00247. Without
biases or a normalisation of its own: ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qpa.adapters.hooked_model import HookedModel
from qpa.documents import TensorRef


class FeedForwardModel(HookedModel):
    """A causal language model with feed-forward adapters. Each `ffa_up` is to start at zero.

    Args:    model: of transformers; changed in place: its own parameters are frozen.
             tensors: ffa_down [width, hidden] and ffa_up [hidden, width] of each adapted module in turn.
    Raises:  ModelError: the model has no such module.
    """

    def __init__(self, model: Any, tensors: Iterable[TensorRef]) -> None:
        super().__init__(model)
        device, blocks = next(model.parameters()).device, {}
        for tensor in tensors:
            block = self.module_for(tensor.module, tensor.role)
            n_out, n_in = tensor.shape
            block.add_module(tensor.role, nn.Linear(n_in, n_out, bias=False, device=device))
            blocks[tensor.module] = block
        for block in blocks.values():
            self.change_output(block, _with_bottleneck)


def _with_bottleneck(block: Any, hidden: Tensor) -> Tensor:
    inner = hidden.to(block.ffa_down.weight.dtype)
    added: Tensor = block.ffa_up(nn.functional.gelu(block.ffa_down(inner)))
    return hidden + added.to(hidden.dtype)
