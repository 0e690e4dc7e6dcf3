"""A gradient estimator from outside: central differences."""

from __future__ import annotations

import torch


class CentralDifference:
    """Run every circuit with every angle a little up and a little down."""

    name = "central-difference"
    needs_differentiable = False
    step = 0.05

    def __init__(self, seed):
        pass

    def vjp(self, source, circuit, angles, measured, cotangent):
        n_circuits, n_angles = angles.shape
        steps = self.step * torch.eye(n_angles, dtype=angles.dtype)
        moved = torch.cat([(angles + sign * steps[:, None]).flatten(0, 1) for sign in (1, -1)])
        above, below = source.probabilities(circuit, moved).view(2, n_angles, n_circuits, -1)
        return ((above - below) * cotangent).sum(-1).T / (2 * self.step)

    def n_evaluations(self, circuit, n_circuits):
        return 2 * circuit.n_angles * n_circuits
