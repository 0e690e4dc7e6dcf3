"""spsa: an estimate from two runs of each circuit, with all angles moved at once.

For a direction d of random signs, dL/dt is estimated as d (L(t + c d) - L(t - c d)) / (2 c), with L linear in
the probabilities. It costs the same for any number of angles, and its noise grows with that number: the
cosine to the gradient is about 1 / sqrt(n_angles). Its expectation is the gradient but for terms of c**2.

Source: Spall, IEEE Trans. Automatic Control 37 (1992), 332.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.estimator import check_cotangent
from qpa.circuits.sources.source import Source, seed_of_angles

STEP = 0.2
"""By how much every angle is moved, in radians: enough for a difference that stands out of the shots'
noise.
"""


@final
class Spsa:
    """Simultaneous perturbation."""

    name: ClassVar[str] = "spsa"
    needs_differentiable: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        """Take the seed of the directions."""
        self.seed = seed

    def vjp(
        self, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor, cotangent: Tensor
    ) -> Tensor:
        """Move all angles of every circuit up and down along random signs, see `GradientEstimator.vjp`."""
        check_cotangent(circuit, angles, cotangent)
        where = angles.detach()
        random = torch.Generator().manual_seed(seed_of_angles(self.seed, where))
        signs = (2 * torch.randint(2, angles.shape, generator=random) - 1).to(angles)
        moved = torch.cat((where + STEP * signs, where - STEP * signs))
        above, below = source.probabilities(circuit, moved).chunk(2)
        slope = ((above - below) * cotangent).sum(1, keepdim=True) / (2 * STEP)
        return slope * signs

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return two runs for each circuit."""
        return 2 * n_circuits
