"""The optimizer that trains a generator while the model trains a plain adapter.

    every optimizer step
      1. adapter.grad is there, from any trainer, any number of micro-batches and ranks
      2. pull it back:  generator.backward(adapter.grad)  -> gradients of angles and decoders
      3. inner AdamW on the generator's own parameters
      4. push forward:  adapter <- initial + generator()

A generator with contexts makes an adapter for each. A step's context is chosen before the push forward of the
step before, so the adapter that a step's rows go through, and the features that its gradient is pulled back
through, are of the context of these rows.

Of several processes the first one takes steps 2 and 3 and runs the circuits; the others get its numbers, and
all decode them.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qpa.adapters.parameter_view import AdapterParameter, leaf_of
from qpa.compat.torch_ import add_each, copy_each, norm_of_each
from qpa.errors import CheckpointError, DivergedError, OptionError, ShapeError, one_sentence
from qpa.generators.fast_weights import contexts_of
from qpa.generators.generator import Generator, ParameterGroup
from qpa.training.processes import ALONE, Processes


class GeneratedAdapterOptimizer(torch.optim.Optimizer):
    """Optimize a generator through the adapter it generates.

    Its param_groups hold the adapter's parameters, so gradient clipping, gradient scalers, schedulers
    and accelerate see what they expect; the lr, betas, eps and weight decay they set are copied into the
    inner AdamW at each step. Its state_dict holds the generator and the inner optimizer, so that a
    trainer's ordinary checkpoint resumes it.

    Args:    adapter: float32 parameters, or parts of some, in the order and shapes of
             `generator.layout.tensors`, on one device; they hold the initial adapter.
             generator: moved to the adapter's device.
             lr: learning rate of the generator's parameter groups that follow "lr", the decoders.
             angle_lr: learning rate of those that follow "angle_lr", angles or what a control has in their
             place; it keeps its ratio to lr under a schedule.
             betas, eps, weight_decay: of AdamW; weight decay applies to the groups that decay, the decoders.
             processes: that train the adapter together, and step together.
             max_grad_norm: the norm to which the gradient of all numbers of the generator is clipped, after
             it was pulled back; None or 0 for not. A trainer that clips, clips the adapter's gradient.
             context_of_step: tells of which of the generator's contexts a step is, by its number from 0; None
             where there are none, or where `use_context` chooses them.
    Raises:  ShapeError: the adapter is not the one the layout was made for.
             OptionError: lr is not above 0.
    """

    def __init__(
        self,
        adapter: Sequence[AdapterParameter],
        generator: Generator,
        *,
        lr: float = 2e-2,
        angle_lr: float = 2e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        processes: Processes = ALONE,
        max_grad_norm: float | None = None,
        context_of_step: Callable[[int], int] | None = None,
    ) -> None:
        _check_shapes(adapter, generator)
        if not lr > 0:
            raise OptionError("lr", "a number above 0", str(lr))
        self.generator: Generator = generator.to(adapter[0].device)
        self._groups = self.generator.parameter_groups()
        self.inner = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "weight_decay": weight_decay if group.decays else 0.0}
                for group in self._groups
            ],
            lr=lr,
            betas=betas,
            eps=eps,
        )
        self.angle_ratio = angle_lr / lr
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        self._adapter = list(adapter)
        # lora_B starts at zero: only what is not zero has to be kept.
        self._shifted = [p for p in adapter if bool(p.detach().any())]
        self._initial = [p.detach().clone() for p in self._shifted]
        self._measured: Tensor | None = None
        self._features = torch.empty(0)
        self.n_steps = 0
        self._processes = processes
        self._context_of_step = context_of_step
        leaves = list(dict.fromkeys(leaf_of(parameter) for parameter in adapter))
        super().__init__(leaves, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._enter_context()
        self._measure()

    def _measure(self) -> None:
        """Run the generator's circuits, and set the adapter to what they give."""
        with self._float32(), torch.set_grad_enabled(self._processes.is_first):
            if self._processes.is_first:
                probabilities = self.generator.run()
                self._share(probabilities)
            else:
                probabilities = self.generator.connect(self._share(None))
            self._push(probabilities)

    def use_context(self, context: int | Tensor) -> None:
        """Set the adapter to that of one of the generator's contexts; the circuits run at its angles.

        In several processes all of them call it. A step that follows is of this context.

        Args:    context: the number of the context, or the vector of one that is not trained.
        """
        contexts_of(self.generator).choose(context)
        self._measure()

    def leave_context(self) -> None:
        """Set the adapter back to that of the context of the next step."""
        if self._context_of_step is not None:
            self.use_context(self._context_of_step(self.n_steps))

    def _enter_context(self) -> None:
        """Choose the context of the next step; the adapter of the last one stays until it is measured."""
        if self._context_of_step is not None:
            contexts_of(self.generator).choose(self._context_of_step(self.n_steps))

    def push_forward(self) -> None:
        """Set adapter <- initial + generator() by what the circuits gave last; no device runs again."""
        with self._float32(), torch.set_grad_enabled(self._processes.is_first):
            self._push(self.generator.connect(self._measured))

    def _share(self, probabilities: Tensor | None) -> Tensor | None:
        """Give all processes the first one's trained numbers and probabilities."""
        with torch.no_grad():
            self._processes.share([parameter.detach() for parameter in self.generator.parameters()])
            return self._processes.share_matrix(probabilities, self._adapter[0].device)

    def share_all(self) -> None:
        """Give all processes the generator of the first, with its bases, and what its circuits gave last."""
        if self._processes.n == 1:
            return
        state = self.generator.state_dict()
        self._processes.share([tensor.detach() for tensor in state.values()])
        self.generator.load_state_dict(state)
        self._measured = self._processes.share_matrix(self._measured, self._adapter[0].device)
        self.push_forward()

    def check_same(self, when: str) -> None:
        """Check that all processes hold the same adapter, bit for bit.

        Args:    when: says in the error when they were compared.
        Raises:  ProcessError: they do not.
        """
        self._processes.check_same(_numbers(self._adapter), when)

    def _push(self, probabilities: Tensor | None) -> None:
        """Set the adapter, keeping the features' graph for the next pull back."""
        self._measured = None if probabilities is None else probabilities.detach()
        self._features = self.generator.features(probabilities)
        with torch.no_grad():
            copy_each(_numbers(self._adapter), self.generator.decode(self._features))
            if self._initial:
                add_each(_numbers(self._shifted), self._initial)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the generator one AdamW step along the adapter's gradient, then the adapter with it.

        An adapter parameter without a gradient counts as zero.

        Raises:  DivergedError: a gradient is not finite; generator and adapter stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._processes.is_first:
            self._move_generator()
        self.n_steps += 1
        self._enter_context()
        self._measure()
        return loss

    def _move_generator(self) -> None:
        self._pull_back()
        self._copy_settings()
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def _pull_back(self) -> None:
        found = [parameter.grad for parameter in self._adapter]
        gradients = [
            torch.zeros_like(numbers) if gradient is None else gradient
            for numbers, gradient in zip(_numbers(self._adapter), found, strict=True)
        ]
        with self._float32(), torch.enable_grad():
            # Decoding again is cheap, and holds an adapter's worth of numbers only here.
            generated = self.generator.decode(self._features)
            # The lora_A of a spectrum alone is its basis, and nothing of it is trained.
            pairs = [(g, c) for g, c in zip(generated, gradients, strict=True) if g.requires_grad]
            torch.autograd.backward([g for g, _ in pairs], [c for _, c in pairs])
        # Every number that is generated reaches a decoder's gradient: these norms see all that is not finite.
        pulled_back = [p.grad for p in self.generator.parameters() if p.grad is not None]
        norms = torch.stack(norm_of_each(pulled_back))
        if not bool(torch.isfinite(norms).all()):
            self.inner.zero_grad(set_to_none=True)
            self.push_forward()
            raise DivergedError(
                f"step {self.n_steps + 1}", "a finite gradient", "NaN or infinity", "lower `lr` or `angle_lr`"
            )
        if self.max_grad_norm:
            self.grad_norm = float(norms.norm())
            torch.nn.utils.clip_grads_with_norm_(
                self.generator.parameters(), self.max_grad_norm, norms.norm()
            )

    def _float32(self) -> torch.autocast:
        """Keep a caller's autocast away from the generator."""
        return torch.autocast(self._adapter[0].device.type, enabled=False)

    def _copy_settings(self) -> None:
        outer = self.param_groups[0]
        for group, inner in zip(self._groups, self.inner.param_groups, strict=True):
            inner.update(lr=outer["lr"] * self._ratio(group), betas=outer["betas"], eps=outer["eps"])
            inner["weight_decay"] = outer["weight_decay"] if group.decays else 0.0

    def _ratio(self, group: ParameterGroup) -> float:
        return self.angle_ratio if group.rate == "angle_lr" else 1.0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Accept the adapter's own group only.

        Raises:  ShapeError: the generator makes one adapter, and there is no room for more parameters.
        """
        if self.param_groups:
            raise ShapeError("adapter", "the parameters the layout was made for", "a further param group")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the param_groups, the generator's and the inner optimizer's state, and what was measured."""
        return {
            **super().state_dict(),
            "generator": self.generator.state_dict(),
            "inner": self.inner.state_dict(),
            "measured": self._measured,
            "n_steps": self.n_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`, and set the adapter to what the restored generator gave, without a run.

        Raises:  CheckpointError: the state is another optimizer's, or of another generator.
        """
        state = dict(state_dict)
        try:
            generator, inner, n_steps = state.pop("generator"), state.pop("inner"), state.pop("n_steps")
            measured = state.pop("measured")
            super().load_state_dict(state)
            self.generator.load_state_dict(generator)
            self.inner.load_state_dict(inner)
        except (KeyError, ValueError, RuntimeError) as error:
            expected = "one of this run's generator"
            raise CheckpointError("optimizer state", expected, one_sentence(error)) from error
        self.n_steps = n_steps
        self._measured = None if measured is None else measured.to(self._adapter[0].device)
        self._enter_context()
        self.push_forward()


def _numbers(adapter: Sequence[AdapterParameter]) -> list[Tensor]:
    """Return what parameters hold, to be written to."""
    return [parameter.detach() for parameter in adapter]


def _check_shapes(adapter: Sequence[AdapterParameter], generator: Generator) -> None:
    expected = [tensor.shape for tensor in generator.layout.tensors]
    found = [tuple(parameter.shape) for parameter in adapter]
    for path, wanted, given in zip(generator.layout.tensors, expected, found, strict=False):
        if wanted != given:
            raise ShapeError(path.path, str(wanted), str(given))
    if len(found) != len(expected):
        raise ShapeError("adapter", f"{len(expected)} tensors", f"{len(found)} tensors")
    if any(parameter.dtype != torch.float32 for parameter in adapter):
        raise ShapeError("adapter", "float32 parameters", str({parameter.dtype for parameter in adapter}))
