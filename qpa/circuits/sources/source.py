"""The protocol behind which simulators, samplers and devices are interchangeable."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpa.circuits.sources.exact import ExactSimulator


class ProbabilitySource(Protocol):
    """Something that can run the circuits and pull gradients back through them.

    Source:  ours.
    """

    def probabilities(self, angles: Tensor) -> Tensor:
        """Return float[n_circuits, 2**n_qubits] for angles float[n_circuits, n_layers, n_qubits]."""
        ...

    def vjp(self, angles: Tensor, cotangent: Tensor) -> Tensor:
        """Return dL/dangles for dL/dp float[n_circuits, 2**n_qubits]."""
        ...


def differentiable_probabilities(source: ProbabilitySource, angles: Tensor) -> Tensor:
    """Evaluate a source so that autograd reaches the angles through the source's own vjp.

    Args:    angles: float[n_circuits, n_layers, n_qubits], radians.
    Returns: float[n_circuits, 2**n_qubits].
    """
    if type(source) is ExactSimulator:
        return source.probabilities(angles)  # saves its states, so the circuits run once, not twice
    probabilities: Tensor = _ThroughSource.apply(angles, source)  # type: ignore[no-untyped-call]
    return probabilities


class _ThroughSource(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, angles: Tensor, source: ProbabilitySource) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.source = source
        return source.probabilities(angles.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return ctx.source.vjp(angles, cotangent), None
