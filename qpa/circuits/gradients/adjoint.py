"""adjoint: the simulator's own backward pass, which needs the states and so a simulator.

Source: adjoint differentiation, arXiv 2009.02823.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.estimator import check_cotangent
from qpa.circuits.sources.source import Source


@final
class Adjoint:
    """Differentiate the simulation."""

    name: ClassVar[str] = "adjoint"
    needs_differentiable: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        """Take a seed, as every estimator does; nothing here is random."""

    def vjp(
        self, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor, cotangent: Tensor
    ) -> Tensor:
        """Simulate the circuits and go back through the simulation, see `GradientEstimator.vjp`."""
        check_cotangent(circuit, angles, cotangent)
        with torch.enable_grad():
            leaf = angles.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(source.probabilities(circuit, leaf), leaf, cotangent)
        return gradient

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return one run for each circuit."""
        return n_circuits
