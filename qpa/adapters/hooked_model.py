"""A base model with an adapter that PEFT does not have: it hangs before or behind modules of it, as hooks.

Whatever qpa does with a model in PEFT, it does with this one as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from qpa.errors import ModelError

Change = Callable[[Any, Tensor], Tensor]
"""A function of a module and a tensor."""


class HookedModel(nn.Module):
    """A causal language model whose modules read or return something else while its adapter is enabled.

    Args:    model: of transformers; changed in place: its own parameters are frozen.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.is_enabled = True

    @property
    def config(self) -> Any:
        """Return the base model's config."""
        return self.model.config

    def get_base_model(self) -> Any:
        """Return the model of transformers, with the adapter in it."""
        return self.model

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the model returns."""
        return self.model(*inputs, **named)

    @property
    def device(self) -> Any:
        """Return the device of the base model."""
        return self.model.device

    def generate(self, **named: Any) -> Any:
        """Return what the model generates."""
        return self.model.generate(**named)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the model answer as the base model while the block runs."""
        self.is_enabled = False
        try:
            yield
        finally:
            self.is_enabled = True

    def module_for(self, path: str, name: str) -> Any:
        """Return a module of the base model that is to hold something of the adapter.

        Args:    name: the name of what the module is to hold.
        Raises:  ModelError: the model has no module of this path, or a module that cannot hold it.
        """
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            advice = "the base model is not the one the adapter was planned for"
            raise ModelError(path, "a module of the base model", "none", advice) from error
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or hasattr(module, name):
            found = f"{type(module).__name__}, which does not"
            raise ModelError(path, f"a block that takes a {name} of its own", found)
        return module

    def change_output(self, module: Any, change: Change) -> None:
        """Let a module return `change(module, output)` while the adapter is enabled.

        Args:    change: the change of a tensor; where a module returns several tensors, of the first one.
        """
        module.register_forward_hook(partial(self._changed, change))

    def change_input(self, module: Any, change: Change) -> None:
        """Let a module read `change(module, input)` while the adapter is enabled.

        Args:    change: the change of the first tensor that the module is given.
        """
        module.register_forward_pre_hook(partial(self._changed_inputs, change))

    def _changed_inputs(self, change: Change, module: Any, inputs: Any) -> Any:
        return (change(module, inputs[0]), *inputs[1:]) if self.is_enabled else inputs

    def add_to_output(self, module: Any, added: Change) -> None:
        """Let a module that gets and returns one tensor add `added(module, input)` while it is enabled."""

        def with_added(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return output + added(module, inputs[0]).to(output.dtype) if self.is_enabled else output

        module.register_forward_hook(with_added)

    def _changed(self, change: Change, module: Any, inputs: Any, output: Any) -> Any:
        if not self.is_enabled:
            return output
        if isinstance(output, tuple):
            return (change(module, output[0]), *output[1:])
        return change(module, output)
