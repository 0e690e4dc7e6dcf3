"""surrogate: the device runs forward, and a simulation of the device is differentiated.

The simulation is p~ = R (w p + (1 - w) / 2**n_qubits), where p are the exact probabilities, w is what a
depolarising channel leaves, and R flips the readout of each qubit with two probabilities of its own. w and R
are fitted to what the device gave forward, so a step costs no further run. The estimate is biased by what
this channel does not describe, and its noise is that of 1 + 2 n_qubits fitted numbers.

Source: ours; the channel is that of arXiv 2006.14044 (readout) and of global depolarising noise.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.estimator import check_cotangent
from qpa.circuits.sources.source import Source

N_FIT_STEPS = 12
"""Steps of Gauss-Newton, more than it takes to stand still from errors of a few percent."""

MAX_FLIP = 0.45
"""The largest probability of a flip that a fit may find."""


@final
class Surrogate:
    """Fit a channel to what was measured, and differentiate through the simulation and the channel."""

    name: ClassVar[str] = "surrogate"
    needs_differentiable: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        """Take a seed, as every estimator does; nothing here is random."""

    def vjp(
        self, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor, cotangent: Tensor
    ) -> Tensor:
        """Go back through the fitted simulation, see `GradientEstimator.vjp`."""
        check_cotangent(circuit, angles, cotangent)
        with torch.enable_grad():
            leaf = angles.detach().requires_grad_()
            exact = circuit.exact_probabilities(leaf)
            channel = fit_channel(exact.detach(), measured)
            (gradient,) = torch.autograd.grad(apply_channel(exact, channel.to(exact)), leaf, cotangent)
        return gradient

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return none: what was measured forward is all that is run."""
        return 0


def apply_channel(probabilities: Tensor, channel: Tensor) -> Tensor:
    """Return what a channel makes of exact probabilities.

    Args:    probabilities: float[n_circuits, 2**n_qubits].
             channel: float[1 + 2 n_qubits]: w, and for every qubit the probabilities that 0 is read as 1 and
             that 1 is read as 0.
    Returns: float[n_circuits, 2**n_qubits].
    """
    n_states = probabilities.shape[1]
    n_qubits = n_states.bit_length() - 1
    kept, flips = channel[0], channel[1:].view(n_qubits, 2)
    mixed = kept * probabilities + (1 - kept) / n_states
    return with_flips(mixed, flips[:, 0], flips[:, 1])


def with_flips(histograms: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return histograms of which each qubit is read wrongly.

    Args:    histograms: float[n_circuits, 2**n_qubits].
             up: float[n_qubits], how often 0 is read as 1; down: how often 1 is read as 0.
    Returns: float[n_circuits, 2**n_qubits], whose rows have the same sums.
    """
    for qubit in range(len(up)):
        zero, one = histograms.view(len(histograms), 2**qubit, 2, -1).unbind(2)
        moved = down[qubit] * one - up[qubit] * zero
        histograms = torch.stack((zero + moved, one - moved), 2).flatten(1)
    return histograms


def fit_channel(exact: Tensor, measured: Tensor) -> Tensor:
    """Return the channel that makes what was measured of the exact probabilities, by least squares.

    Args:    exact, measured: float[n_circuits, 2**n_qubits].
    Returns: float64[1 + 2 n_qubits], see `apply_channel`; w within 0 and 1, flips within 0 and MAX_FLIP.
    """
    n_qubits = exact.shape[1].bit_length() - 1
    exact, measured = exact.double(), measured.double()
    channel = exact.new_zeros(1 + 2 * n_qubits)
    channel[0] = 1.0
    top = torch.full_like(channel, MAX_FLIP)
    top[0] = 1.0
    # A little of the identity channel keeps numbers that the data does not determine where they are.
    weight = 1e-6 * exact.square().sum() * torch.eye(len(channel), dtype=exact.dtype, device=exact.device)
    for _ in range(N_FIT_STEPS):
        jacobian = torch.stack([_slope(exact, channel, number) for number in range(len(channel))], 1)
        missing = (measured - apply_channel(exact, channel)).flatten()
        step = torch.linalg.solve(jacobian.T @ jacobian + weight, jacobian.T @ missing)
        channel = (channel + step).clamp(min=torch.zeros_like(top), max=top)
    return channel


def _slope(exact: Tensor, channel: Tensor, number: int) -> Tensor:
    """Return the derivative of what the channel gives, flat, by one of its numbers: it is linear in each."""
    at_one, at_zero = channel.clone(), channel.clone()
    at_one[number], at_zero[number] = 1.0, 0.0
    return (apply_channel(exact, at_one) - apply_channel(exact, at_zero)).flatten()
