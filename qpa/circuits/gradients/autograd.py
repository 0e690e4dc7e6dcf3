"""A gradient estimator as an operation of autograd, whose backward pass it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.estimator import GradientEstimator
from qpa.circuits.sources.source import Source


def through_estimator(
    estimator: GradientEstimator, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor
) -> Tensor:
    """Return measured probabilities, from which autograd reaches the angles by the estimator.

    Args:    angles: float[n_circuits, n_angles], radians.
             measured: float[n_circuits, 2**n_qubits], which the source gave for these angles.
    """
    connected: Tensor = _Through.apply(angles, measured, estimator, source, circuit)  # type: ignore[no-untyped-call]
    return connected


class _Through(Function):
    @staticmethod
    def forward(ctx: Any, angles: Tensor, measured: Tensor, *parts: Any) -> Tensor:
        ctx.save_for_backward(angles, measured)
        ctx.parts = parts
        return measured.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        angles, measured = ctx.saved_tensors
        estimator, source, circuit = ctx.parts
        return estimator.vjp(source, circuit, angles, measured, cotangent), None, None, None, None
