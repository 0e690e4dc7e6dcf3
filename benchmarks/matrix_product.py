"""Angles for a warm start: a target, compressed to a matrix product state, and a circuit fitted to it.

    vector [2**n] --successive SVDs--> cores [left, 2, right] --contraction--> vector --L-BFGS--> angles

A matrix product state of bond dimension b has at most 2 n b**2 numbers, and qubit 0, the most significant bit
of the basis state's number, is its first core.

Source: the warm start of a circuit from a matrix product state is that of arXiv 2208.13673, which turns cores
into gates; the successive SVDs are those of DOI 10.1137/090752286, algorithm 1; to fit the angles of a given
ansatz on the exact simulator instead, and by probabilities alone, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qpa.circuits.ansatz import kind_of
from qpa.circuits.circuit import Circuit
from qpa.documents import Ansatz
from qpa.errors import OptionError, ShapeError
from qpa.seeds import split_seed

MAX_ITERATIONS = 400

START_NOISE, RESTART_NOISE = 0.01, 0.1
"""Standard deviations, in radians, of what the first fit, and every further one, adds to the uniform state.

On 11 qubits and 12 layers, fits from 0.3 and more ended at a fidelity of 0.7 where these ended at 0.92.
"""

_TINY = 1e-14
"""What keeps the root of a probability of 0 differentiable."""


class Fit(NamedTuple):
    """Fitted angles.

    Args:    angles: float64[n_angles], radians.
             fidelity: (sum_x sqrt(p(x) q(x)))**2 of the circuit's probabilities p and the target q, after
             Bhattacharyya; 1 is exact.
    """

    angles: Tensor
    fidelity: float


def to_matrix_product(vector: Tensor, bond: int) -> list[Tensor]:
    """Return a vector as a matrix product state, compressed by successive SVDs.

    Every bond keeps its largest singular values. What is left is an orthogonal projection of the vector, so a
    larger bond is never worse.

    Args:    vector: float64[2**n_qubits], not zero.
             bond: the largest bond dimension; 2**(n_qubits // 2) or more is exact.
    Returns: cores float64[left, 2, right], one for each qubit; the first `left` and the last `right` are 1.
    Raises:  ShapeError: the vector's length is no power of two of at least 2.
             OptionError: the bond dimension is below 1.
    """
    n_qubits = len(vector).bit_length() - 1
    if n_qubits < 1 or vector.shape != (2**n_qubits,):
        raise ShapeError("vector", "[2**n_qubits]", str(tuple(vector.shape)))
    if bond < 1:
        raise OptionError("bond", "at least 1", str(bond))
    cores, rest = [], vector.reshape(1, -1)
    for _ in range(n_qubits - 1):
        left = len(rest)
        u, s, vh = torch.linalg.svd(rest.reshape(2 * left, -1), full_matrices=False)
        cores.append(u[:, :bond].reshape(left, 2, -1))
        rest = s[:bond, None] * vh[:bond]
    return [*cores, rest.reshape(-1, 2, 1)]


def to_vector(cores: Sequence[Tensor]) -> Tensor:
    """Return the amplitudes of a matrix product state.

    Args:    cores: as `to_matrix_product` gives them.
    Returns: float64[2**n_qubits], of norm 1.
    """
    vector = cores[0].flatten(0, 1)
    for core in cores[1:]:
        vector = torch.tensordot(vector, core, 1).flatten(0, 1)
    return torch.nn.functional.normalize(vector.flatten(), dim=0)


def fit_angles(ansatz: Ansatz, target: Tensor, seed: int, n_starts: int = 4) -> Fit:
    """Return angles with which a circuit's probabilities come nearest to a target.

    L-BFGS on the exact simulator, from the uniform state with a little noise first, then with more noise; the
    best fit is kept.

    Args:    ansatz: the circuit; up to about 12 qubits take seconds.
             target: float64[2**n_qubits], not negative; its sum does not matter.
             seed: of the noise.
             n_starts: how many fits are made.
    Raises:  ShapeError: the target is not the circuit's.
             OptionError: there is no start.
             DocumentError: this qpa has no such ansatz.
    """
    if target.shape != (2**ansatz.n_qubits,):
        raise ShapeError("target", str((2**ansatz.n_qubits,)), str(tuple(target.shape)))
    if n_starts < 1:
        raise OptionError("n_starts", "at least 1", str(n_starts))
    circuit, root = Circuit(ansatz), torch.sqrt(target / target.sum())
    fits = [_fit(circuit, root, angles) for angles in _starts(ansatz, seed, n_starts)]
    return max(fits, key=lambda fit: fit.fidelity)


def _starts(ansatz: Ansatz, seed: int, n_starts: int) -> Tensor:
    """Return float64[n_starts, n_angles], radians."""
    random = torch.Generator().manual_seed(split_seed(seed, "warm start"))
    noise = torch.randn((n_starts, ansatz.n_angles), generator=random, dtype=torch.float64)
    uniform = kind_of(ansatz).window_angles(ansatz, torch.zeros(1, 0, dtype=torch.float64))
    return uniform + torch.cat((START_NOISE * noise[:1], RESTART_NOISE * noise[1:]))


def _fit(circuit: Circuit, root: Tensor, start: Tensor) -> Fit:
    """Return the fit from angles float64[n_angles] to roots of probabilities float64[2**n_qubits]."""
    angles = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [angles], max_iter=MAX_ITERATIONS, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def overlap() -> Tensor:
        return root @ torch.sqrt(circuit.exact_probabilities(angles[None])[0] + _TINY)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = 1 - overlap()
        torch.autograd.backward(found)
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return Fit(angles.detach(), float(overlap()) ** 2)
