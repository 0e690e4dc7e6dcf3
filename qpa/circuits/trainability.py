"""How far the angles of a circuit move what is read off it: gradients by layer, and independent directions.

Two questions are answered, by exact simulation, for any angles such as those of a start or random ones.

1. How large are gradients? For a function f of a basis state's probability, a layer's mean square gradient is

       G = mean over draws of angles t, angles i of the layer, basis states x of (d f(p_x) / d t_i)^2

   For angles drawn uniformly from a period, each gradient's mean over draws is 0, being the integral of the
   derivative of a periodic function: there G is the variance whose vanishing with the number of qubits is
   called a barren plateau. For other angles it is the mean square. The sum over basis states is not computed
   but estimated without bias, from one vector-Jacobian product for each draw: with v a vector of
   n = 2**n_qubits independent signs, each +1 or -1,

       sum over x of (d f(p_x) / d t_i)^2 = mean over v of (d sum_x v_x f(p_x) / d t_i)^2

   so that what is squared is also the gradient that a random linear readout of all f(p_x) would pass on. A
   layer of k angles is estimated from m draws with a relative standard error of about sqrt(2 / (m k)), and of
   more where angles and draws differ, as they do for f = p at states of few layers.

   What to expect: for f = sqrt(p n) and real amplitudes it is 1/4 exactly, at any angles and for any number
   of qubits, because (d sqrt(p))^2 is the square of the amplitude's derivative, and the derivative of a state
   by the angle of one rotation has a length of 1/2. With sqrt(p n + eps) it is less: 0.221 at random states
   for eps = 0.01. Complex amplitudes of random states have half, since half of a derivative turns phases. For
   f = p it is near 4**-n_qubits at random real states, and so near 1 for f = p n: there p vanishes for its
   scale alone. States of few layers are far from random ones, and then f = p n grows with the number of
   qubits where the root does not.

2. In how many directions do features move? The Jacobian of one circuit's features by its angles is computed
   whole, from the probabilities at angles shifted by +-pi/2; its singular values tell.

Source: arXiv 1803.11173, for variances of gradients; M. F. Hutchinson 1989, doi 10.1080/03610918908812806,
for random signs; arXiv 1811.11184, equation 2, for shifts; O. Roy and M. Vetterli, EUSIPCO 2007, "The
effective rank", definition 1; the choice of quantities is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from qpa.circuits.ansatz import kind_of
from qpa.circuits.circuit import Circuit
from qpa.documents import Ansatz

Readout = Callable[[Tensor], Tensor]
"""Of probabilities float[n, 2**n_qubits], one row for each circuit, gives float[n, n_numbers]; a row depends
on its own circuit alone."""

MIN_DRAWS, MAX_DRAWS = 16, 128
_N_AMPLITUDES = 2**16
"""The amplitudes of all draws together, within the bounds on draws; this bounds the time."""

_N_AT_ONCE = 2**18
"""The most amplitudes that are simulated at once, where this is a circuit or more; this bounds the memory."""

RANK_TOLERANCE = 1e-3
"""A direction counts if it moves features at least this far, the farthest being 1."""


@dataclass(frozen=True)
class Gradients:
    """Mean square gradients by layer, the first layer first, each per radian squared.

    Args:    feature: of a function of the probabilities.
             probability: of the probabilities themselves.
             n_draws: the draws of angles and signs of which they are means.
             layer_sizes: the number of angles of each layer.
    """

    feature: tuple[float, ...]
    probability: tuple[float, ...]
    n_draws: int
    layer_sizes: tuple[int, ...]

    @property
    def mean_feature(self) -> float:
        """Return the mean over all angles of the feature's mean squares."""
        return self._over_angles(self.feature)

    @property
    def mean_probability(self) -> float:
        """Return the mean over all angles of the probability's mean squares."""
        return self._over_angles(self.probability)

    def _over_angles(self, by_layer: tuple[float, ...]) -> float:
        products = (value * size for value, size in zip(by_layer, self.layer_sizes, strict=True))
        return sum(products) / sum(self.layer_sizes)


@dataclass(frozen=True)
class Expressivity:
    """What the angles of one circuit can do to its features, near where they are; means over some circuits.

    Args:    rank: the number of singular values of the Jacobian above RANK_TOLERANCE of the largest: the
             independent directions in which features move.
             effective_rank: exp of the entropy of the singular values, divided by their sum.
             n_for_99_percent: the fewest directions with 99 % of the sum of squared singular values.
             spread: the standard deviation of the features over basis states.
    """

    rank: float
    effective_rank: float
    n_for_99_percent: float
    spread: float


def n_draws_for(n_qubits: int) -> int:
    """Return how many draws of angles a mean square is estimated from: fewer, the longer each takes."""
    return min(MAX_DRAWS, max(MIN_DRAWS, _N_AMPLITUDES >> n_qubits))


def uniform_angles(ansatz: Ansatz, n_draws: int, random: torch.Generator) -> Tensor:
    """Return float32[n_draws, n_angles], radians, drawn uniformly from [-pi, pi)."""
    return torch.empty(n_draws, ansatz.n_angles).uniform_(-math.pi, math.pi, generator=random)


def layer_sizes(ansatz: Ansatz) -> tuple[int, ...]:
    """Return the number of angles of each layer, whose angles are in order.

    The last layers of a circuit have as many angles as a circuit of these layers alone.
    """
    kind = kind_of(ansatz)
    last = [kind.n_angles(ansatz.n_qubits, n_layers) for n_layers in range(1, ansatz.n_layers + 1)]
    return tuple(after - before for before, after in pairwise([0, *last]))[::-1]


def gradients_at(circuit: Circuit, angles: Tensor, feature: Readout, random: torch.Generator) -> Gradients:
    """Estimate the mean square gradients of a feature, and of the probability, of one basis state.

    Args:    angles: float[n_draws, n_angles], radians: one row for each draw.
             feature: maps every probability to the feature of its basis state, of the same shape.
             random: of the signs.
    Returns: what the text of this module calls G, for each layer.
    """
    sizes = layer_sizes(circuit.ansatz)
    totals = torch.zeros(2, circuit.n_angles, dtype=torch.float64)
    for some in torch.split(angles, _n_rows(circuit)):
        leaf = some.detach().requires_grad_()
        probabilities = circuit.exact_probabilities(leaf)
        for total, values in zip(totals, (feature(probabilities), probabilities), strict=True):
            signs = 2.0 * torch.randint(2, values.shape, generator=random).to(values.dtype) - 1
            (gradient,) = torch.autograd.grad(values, leaf, signs, retain_graph=True)
            total += gradient.double().square().sum(0)
    totals /= len(angles) * circuit.n_states
    of_feature, of_probability = (
        tuple(float(of_layer.mean()) for of_layer in torch.split(total, list(sizes))) for total in totals
    )
    return Gradients(of_feature, of_probability, len(angles), sizes)


def expressivity_at(circuit: Circuit, angles: Tensor, features: Readout) -> Expressivity:
    """Return the directions in which each circuit's angles move its features, as means over the circuits.

    Args:    angles: float[n_circuits, n_angles], radians.
             features: of a circuit's basis states, or of some of them.
    """
    found = [_expressivity(jacobian(circuit, row, features)) for row in angles]
    values = features(circuit.exact_probabilities(angles))
    spread = float(values.std(dim=1, correction=0).mean())
    rank, effective_rank, n_for_99_percent = (sum(column) / len(found) for column in zip(*found, strict=True))
    return Expressivity(rank, effective_rank, n_for_99_percent, spread)


@torch.no_grad()
def jacobian(circuit: Circuit, angles: Tensor, features: Readout) -> Tensor:
    """Return the derivatives of one circuit's features by its angles, exactly up to rounding.

    Every angle has to be that of one rotation exp(-i t/2 P), as for parameter-shift gradients; the circuit is
    simulated twice for each.

    Args:    angles: float[n_angles], radians.
             features: gives n_features numbers of a circuit.
    Returns: float[n_angles, n_features], of the dtype of the angles, per radian.
    """
    shifts = 0.5 * math.pi * torch.eye(len(angles), dtype=angles.dtype)
    at_angles = circuit.exact_probabilities(angles[None])
    rows = []
    for some in torch.split(shifts, _n_rows(circuit)):
        above, below = (circuit.exact_probabilities(angles + sign * some) for sign in (1, -1))
        point = at_angles.expand_as(above).contiguous()
        rows.append(jvp(features, point, 0.5 * (above - below))[1])  # type: ignore[no-untyped-call]
    return torch.cat(rows)


def _expressivity(derivatives: Tensor) -> tuple[int, float, int]:
    """Return rank, effective rank and directions for 99 % of a Jacobian; zeros if nothing moves."""
    values = torch.linalg.svdvals(derivatives).double()
    if not values[0]:
        return 0, 0.0, 0
    shares = values / values.sum()
    squares = values.square().cumsum(0)
    return (
        int((values > RANK_TOLERANCE * values[0]).sum()),
        math.exp(float(torch.special.entr(shares).sum())),
        1 + int((squares < 0.99 * squares[-1]).sum()),
    )


def _n_rows(circuit: Circuit) -> int:
    """Return how many circuits are simulated at once."""
    return max(1, _N_AT_ONCE // circuit.n_states)
