"""parameter-shift: exact gradients from runs of the circuit alone, as a device can give them.

For an angle t of a rotation exp(-i t/2 P), dp/dt = (p(t + pi/2) - p(t - pi/2)) / 2.

With shots, the cotangent at the basis states that were sampled is averaged, which is the same as its product
with their histogram. The estimate is unbiased.

Source: arXiv 1803.00745; arXiv 1811.11184.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.estimator import check_cotangent
from qpa.circuits.sources.source import Source


@final
class ParameterShift:
    """Run every circuit with every angle shifted up and down; all runs travel in one call."""

    name: ClassVar[str] = "parameter-shift"
    needs_differentiable: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        """Take a seed, as every estimator does; nothing here is random but the source."""

    def vjp(
        self, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor, cotangent: Tensor
    ) -> Tensor:
        """Contract the differences of shifted runs with the cotangent, see `GradientEstimator.vjp`."""
        check_cotangent(circuit, angles, cotangent)
        n_circuits, n_angles = angles.shape
        shifts = 0.5 * math.pi * torch.eye(n_angles, dtype=angles.dtype, device=angles.device)
        signed = torch.stack((shifts, -shifts))
        shifted = (angles.detach() + signed[:, :, None]).reshape(-1, n_angles)
        above, below = source.probabilities(circuit, shifted).view(2, n_angles, n_circuits, -1)
        gradient: Tensor = 0.5 * ((above - below) * cotangent).sum(-1).T
        return gradient

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return two runs for each angle of each circuit."""
        return 2 * circuit.n_angles * n_circuits
