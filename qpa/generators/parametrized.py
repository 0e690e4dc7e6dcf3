"""Tensors that come of numbers of their own, without chunks, and the generator of such tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpa.documents import ParametrizedTensor, WeightLayout
from qpa.documents.tensors import Shape
from qpa.errors import ShapeError
from qpa.generators.generator import Bases, ParameterGroup
from qpa.generators.parametrizations.kind import PARAMETRIZATIONS
from qpa.seeds import split_seed

ANGLES = "angles"
"""The name of the parameters of a parametrization that are angles."""


class ParametrizedTensors(nn.Module):
    """The tensors of a layout that come without chunks, those of one kind, shape and size together.

    Args:    layout: gives the tensors and how many numbers each trains.
             seed: with a tensor's path it gives the seed of all that is drawn for the tensor.
    Raises:  ShapeError: a module trains another number of parameters than the layout says.
    """

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        alike: dict[tuple[str, Shape, tuple[tuple[str, int], ...]], list[ParametrizedTensor]] = {}
        for tensor in layout.parametrized:
            alike.setdefault((tensor.kind, tensor.shape, tensor.sizes), []).append(tensor)
        self._paths = [[tensor.path for tensor in tensors] for tensors in alike.values()]
        self.stacks = nn.ModuleList(
            PARAMETRIZATIONS[kind].build(shape, dict(sizes), [split_seed(seed, path) for path in paths])
            for (kind, shape, sizes), paths in zip(alike, self._paths, strict=True)
        )
        for tensors, stack in zip(alike.values(), self.stacks, strict=True):
            expected = sum(tensor.n_parameters for tensor in tensors)
            found = sum(parameter.numel() for parameter in stack.parameters())
            if expected != found:
                raise ShapeError(tensors[0].path, f"{expected:,} trained numbers", f"{found:,}")

    def forward(self) -> dict[str, Tensor]:
        """Return what is generated of every tensor, by path."""
        return {
            path: generated
            for paths, stack in zip(self._paths, self.stacks, strict=True)
            for path, generated in zip(paths, stack().unbind(), strict=True)
        }

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return the tensors' numbers, which decay as decoders do, and their angles."""
        found = list(self.named_parameters())
        is_angles = [name.rpartition(".")[2] == ANGLES for name, _ in found]
        own = tuple(p for (_, p), is_angle in zip(found, is_angles, strict=True) if not is_angle)
        angles = tuple(p for (_, p), is_angle in zip(found, is_angles, strict=True) if is_angle)
        groups = (
            ParameterGroup("own numbers", own, rate="lr", decays=True),
            ParameterGroup("angles", angles, rate="angle_lr", decays=False),
        )
        return tuple(group for group in groups if group.parameters)


class ParametrizedGenerator(nn.Module):
    """Generate an adapter whose tensors all come without chunks; a `qpa.generators.generator.Generator`.

    It runs no circuit whose probabilities are measured, and has no features.

    Args:    layout: without groups.
             seed: of all that is drawn.
    Raises:  ShapeError: see `ParametrizedTensors`.
    Source:  ours.
    """

    def __init__(self, layout: WeightLayout, seed: int) -> None:
        super().__init__()
        self.layout = layout
        self.parametrized = ParametrizedTensors(layout, seed)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return those of the tensors."""
        return self.parametrized.parameter_groups()

    def run(self) -> None:
        """Return no probabilities."""

    def connect(self, measured: Tensor | None) -> None:
        """Return no probabilities."""

    def features(self, probabilities: Tensor | None) -> Tensor:
        """Return no features, float32[0]."""
        return torch.empty(0)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the generated part of every adapter tensor, in the order and shapes of `layout.tensors`."""
        return self.decode(self.features(None))

    def decode(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return what `forward` returns; nothing is read of `features`."""
        found: dict[str, Tensor] = self.parametrized()
        return tuple(found[tensor.path] for tensor in self.layout.tensors)

    def set_bases(self, bases: Bases) -> None:
        """Take nothing: there is no spectrum."""
