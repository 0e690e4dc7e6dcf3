"""Fast weights: a network programs what is trained in the features from a context.

One generator makes an adapter for each of several tasks. With theta the angles (or a control's numbers), z a
context of d numbers and W the network, a matrix that starts at zero:

    theta(z) = theta_0 + W z / d

theta_0 and W are trained, so at the start all contexts have the adapter that the features start with. The
division lets a step move W's part of an angle about as far as theta_0's, whatever d is. A task's context is a
vector of its own, drawn from a normal distribution and trained; that of a prompt is what the base model makes
of it (`qpa.training.contexts`), so that it is known of texts too that were never trained on.

Nothing but theta is programmed: decoders and directions are shared by all contexts.

Source: J. Schmidhuber, "Learning to control fast-weight memories", Neural Computation 4 (1992): a slow
        network programs the weights of a fast one. S. Y.-C. Chen, "Learning to program variational quantum
        circuits with fast weights", arXiv 2402.17760: the fast weights are the angles of a circuit, and the
        programmer is a network that reads each input of a sequence. The adapter, the contexts and the form
        of W are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qpa.documents import Contexts, WeightLayout
from qpa.seeds import split_seed

_MODULE = "contexts"


class ContextVectors(nn.Module):
    """The contexts of a generator, one of which is current.

    "vectors" float32[n_contexts, size] is a parameter for tasks and a buffer for prompts, whose "center"
    float32[size] and "scale" float32[] lead from what a model makes of a text to its vector.
    """

    def __init__(self, contexts: Contexts, seed: int) -> None:
        super().__init__()
        self.names = contexts.names
        random = torch.Generator().manual_seed(split_seed(seed, _MODULE))
        drawn = torch.randn(len(contexts.names), contexts.size, generator=random)
        if contexts.kind == "task":
            self.vectors = nn.Parameter(drawn)
        else:
            self.register_buffer("vectors", torch.zeros_like(drawn))
            self.register_buffer("center", torch.zeros(contexts.size))
            self.register_buffer("scale", torch.ones(()))
        self.chosen: int | Tensor = 0

    def current(self) -> Tensor:
        """Return float32[size], the vector of the current context."""
        return self.vectors[self.chosen] if isinstance(self.chosen, int) else self.chosen

    def choose(self, context: int | Tensor) -> None:
        """Make a context current: by its number, or by its vector where it is none of these."""
        self.chosen = context

    @torch.no_grad()
    def set_raw(self, raw: Tensor) -> None:
        """Set the vectors of prompts, and what is subtracted from them and divides them.

        Args:    raw: float32[n_contexts, size], whose mean and root mean square these are.
        """
        self.get_buffer("center").copy_(raw.mean(0))
        spread = (raw - raw.mean(0)).square().mean().sqrt()
        self.get_buffer("scale").copy_(spread if spread > 0 else torch.ones(()))
        self.vectors.copy_(self.normalised(raw))

    def normalised(self, raw: Tensor) -> Tensor:
        """Return the vector of what a model made of a text, float32[..., size]."""
        center, scale = self.get_buffer("center"), self.get_buffer("scale")
        return (raw.to(center) - center) / scale


class Program(nn.Module):
    """A parametrization of torch: a parameter plus what the network makes of the current context.

    Args:    n: the parameter's numbers.
             size: numbers of a context.
             current: returns the current context.
    """

    def __init__(self, n: int, size: int, current: Callable[[], Tensor]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(n, size))
        self.current = current

    def forward(self, own: Tensor) -> Tensor:
        """Return the programmed parameter, of the shape of its own part."""
        context = self.current()
        return own + (self.weights @ context / len(context)).view_as(own)


def add_program(generator: nn.Module, features: Any, layout: WeightLayout, seed: int) -> None:
    """Let contexts program the trained parameters of a generator's features, where the layout has contexts.

    Args:    features: the generator's module of features, changed in place.
             seed: draws the vectors of tasks.
    """
    contexts = layout.features.contexts
    if contexts is None:
        return
    vectors = ContextVectors(contexts, seed)
    generator.add_module(_MODULE, vectors)
    for name, parameter in list(features.named_parameters()):
        if parameter.requires_grad:
            path, _, own = name.rpartition(".")
            program = Program(parameter.numel(), contexts.size, vectors.current)
            parametrize.register_parametrization(features.get_submodule(path), own, program)


def contexts_of(generator: Any) -> ContextVectors:
    """Return the contexts of a generator whose layout has some."""
    found = generator.get_submodule(_MODULE)
    assert isinstance(found, ContextVectors)
    return found
