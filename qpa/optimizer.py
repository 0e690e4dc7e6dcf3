"""The optimizer that trains a generator while the model trains a plain adapter.

    every optimizer step
      1. adapter.grad is there, from any trainer, any number of micro-batches and ranks
      2. pull it back:  generator.backward(adapter.grad)  -> gradients of angles and decoders
      3. inner AdamW on the generator's own parameters
      4. push forward:  adapter <- initial + generator()

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qpa.errors import CheckpointError, DivergedError, ShapeError
from qpa.generator import Generator


class GeneratedAdapterOptimizer(torch.optim.Optimizer):
    """Optimize a generator through the adapter it generates.

    Its param_groups hold the adapter's parameters, so gradient clipping, gradient scalers, schedulers
    and accelerate see what they expect; the learning rate they set is copied into the inner AdamW at
    each step. Its state_dict holds the generator and the inner optimizer, so that a trainer's ordinary
    checkpoint resumes it.

    Args:    adapter: float32 parameters in the order and shapes of `generator.layout.tensors`, on one
             device; they hold the initial adapter.
             generator: moved to the adapter's device.
             lr: learning rate of the decoders.
             angle_lr: learning rate of the angles; it follows lr's schedule.
             betas, eps, weight_decay: of AdamW; weight decay applies to the decoders only.
    Raises:  ShapeError: the adapter is not the one the layout was made for.
    """

    def __init__(
        self,
        adapter: Sequence[Parameter],
        generator: Generator,
        *,
        lr: float = 3e-3,
        angle_lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check_shapes(adapter, generator)
        self.generator = generator.to(adapter[0].device)
        self.inner = torch.optim.AdamW(
            [
                {"params": list(self.generator.decoders.parameters()), "weight_decay": weight_decay},
                {"params": [self.generator.angles], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=betas,
            eps=eps,
        )
        self.angle_ratio = angle_lr / lr if lr else 1.0
        self._adapter: list[Tensor] = list(adapter)
        self._initial = [parameter.detach().clone() for parameter in adapter]
        self._outputs: tuple[Tensor, ...] = ()
        self.n_steps = 0
        super().__init__(list(adapter), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.push_forward()

    @torch.no_grad()
    def push_forward(self) -> None:
        """Set adapter <- initial + generator(), keeping the generator's graph for the next pull back."""
        with torch.enable_grad():
            self._outputs = self.generator()
        torch._foreach_copy_(self._adapter, torch._foreach_add(self._initial, list(self._outputs)))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the generator one AdamW step along the adapter's gradient, then the adapter with it.

        An adapter parameter without a gradient counts as zero.

        Raises:  DivergedError: a gradient is not finite; generator and adapter stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pull_back()
        self._copy_learning_rate()
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        self.n_steps += 1
        self.push_forward()
        return loss

    def _pull_back(self) -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._adapter]
        torch.autograd.backward(self._outputs, gradients)
        # Every number of the adapter reaches a decoder's gradient, so these norms see all that is not finite.
        norms = torch._foreach_norm([p.grad for p in self.generator.parameters() if p.grad is not None])
        if not bool(torch.isfinite(torch.stack(norms)).all()):
            self.inner.zero_grad(set_to_none=True)
            self.push_forward()
            raise DivergedError(
                f"step {self.n_steps + 1}", "a finite gradient", "NaN or infinity", "lower --lr or --angle-lr"
            )

    def _copy_learning_rate(self) -> None:
        lr = self.param_groups[0]["lr"]
        decoders, angles = self.inner.param_groups
        decoders["lr"] = lr
        angles["lr"] = lr * self.angle_ratio

    def state_dict(self) -> dict[str, Any]:
        """Return the outer param_groups, the generator's and the inner optimizer's state."""
        return {
            **super().state_dict(),
            "generator": self.generator.state_dict(),
            "inner": self.inner.state_dict(),
            "n_steps": self.n_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()` and set the adapter to what the restored generator gives.

        Raises:  CheckpointError: the state is another optimizer's, or of another generator.
        """
        state = dict(state_dict)
        try:
            generator, inner, n_steps = state.pop("generator"), state.pop("inner"), state.pop("n_steps")
            super().load_state_dict(state)
            self.generator.load_state_dict(generator)
            self.inner.load_state_dict(inner)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError("optimizer state", "one of this run's generator", str(error)) from error
        self.n_steps = n_steps
        self.push_forward()


def _check_shapes(adapter: Sequence[Parameter], generator: Generator) -> None:
    expected = [tensor.shape for tensor in generator.layout.tensors]
    found = [tuple(parameter.shape) for parameter in adapter]
    if found != expected:
        wrong = next((pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]), None)
        detail = f"{wrong[0]}, found {wrong[1]}" if wrong else f"{len(expected)} tensors"
        raise ShapeError("adapter", f"the layout's shapes ({detail})", f"{len(found)} tensors")
    if any(parameter.dtype != torch.float32 for parameter in adapter):
        raise ShapeError("adapter", "float32 parameters", str({parameter.dtype for parameter in adapter}))
