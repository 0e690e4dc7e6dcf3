"""The feed-forward adapter: a bottleneck behind a block of the base model, h + up(gelu(down(h))).

PEFT has none. `up` starts at zero, so the model starts as the base.

Source: arXiv 1902.00751; the place behind the feed-forward block alone is that of arXiv 2005.00247. Without
biases or a normalisation of its own: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qpa.documents import TensorShape, module_of
from qpa.errors import ModelError


class FeedForwardModel(nn.Module):
    """A causal language model with feed-forward adapters; where qpa meets a model in PEFT, this does as well.

    Args:    model: of transformers; changed in place: its own parameters are frozen.
             tensors: paths `<module>.ffa_down.weight` [width, hidden] and `<module>.ffa_up.weight`
             [hidden, width].
    Raises:  ModelError: the model has no such module.
    """

    def __init__(self, model: Any, tensors: Iterable[TensorShape]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.is_enabled = True
        device = next(model.parameters()).device
        for tensor in tensors:
            path, role = module_of(tensor.path), tensor.path.removesuffix(".weight").rpartition(".")[2]
            try:
                block = model.get_submodule(path)
            except AttributeError as error:
                advice = "the base model is not the one the adapter was planned for"
                raise ModelError(path, "a module of the base model", "none", advice) from error
            if isinstance(block, (nn.Sequential, nn.ModuleList)) or hasattr(block, role):
                expected = f"a block that takes a {role} of its own"
                raise ModelError(path, expected, f"{type(block).__name__}, which does not")
            n_out, n_in = tensor.shape
            block.add_module(role, nn.Linear(n_in, n_out, bias=False, device=device))
            if role == "ffa_up":
                block.register_forward_hook(self._add)

    @property
    def config(self) -> Any:
        """Return the base model's config."""
        return self.model.config

    def get_base_model(self) -> Any:
        """Return the model of transformers, with the adapters in it."""
        return self.model

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the model returns."""
        return self.model(*inputs, **named)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base model for a while."""
        self.is_enabled = False
        try:
            yield
        finally:
            self.is_enabled = True

    def _add(self, block: Any, inputs: Any, output: Any) -> Any:
        if not self.is_enabled:
            return output
        if isinstance(output, tuple):
            return (self._added(block, output[0]), *output[1:])
        return self._added(block, output)

    def _added(self, block: Any, hidden: Tensor) -> Tensor:
        inner = hidden.to(block.ffa_down.weight.dtype)
        added: Tensor = block.ffa_up(nn.functional.gelu(block.ffa_down(inner)))
        return hidden + added.to(hidden.dtype)
