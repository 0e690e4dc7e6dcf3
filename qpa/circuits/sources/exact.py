"""Exact simulation of RY layers with a linear CNOT chain, batched over independent circuits.

RY and CNOT are real, so the amplitudes are. Two forms of the same circuit, both with a backward pass of their
own: `qpa.circuits.sources.dense_chain` is faster for up to seven qubits,
`qpa.circuits.sources.kronecker_chain` beyond.

Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpa.circuits.sources.dense_chain import DenseChain
from qpa.circuits.sources.kronecker_chain import KroneckerChain
from qpa.errors import ShapeError

MAX_DENSE_QUBITS = 7
"""Up to here one matrix of side 2**n_qubits a layer is faster (`python -m benchmarks.circuit_time`)."""


class ExactSimulator:
    """The noiseless probability source; differentiable by autograd."""

    def probabilities(self, angles: Tensor) -> Tensor:
        """Simulate every circuit and return its basis-state probabilities.

        Args:    angles: float[n_circuits, n_layers, n_qubits], radians.
        Returns: float[n_circuits, 2**n_qubits], rows sum to 1; qubit 0 is the most significant bit.
        Raises:  ShapeError: angles is not of rank 3, or has no layer or no qubit.
        """
        if angles.dim() != 3 or 0 in angles.shape:
            raise ShapeError(
                "angles", "[n_circuits, n_layers, n_qubits], none of them 0", str(list(angles.shape))
            )
        chain = DenseChain if angles.shape[-1] <= MAX_DENSE_QUBITS else KroneckerChain
        probabilities: Tensor = chain.apply(angles)  # type: ignore[no-untyped-call]
        return probabilities

    def vjp(self, angles: Tensor, cotangent: Tensor) -> Tensor:
        """Pull a gradient of the probabilities back to the angles.

        Args:    angles: float[n_circuits, n_layers, n_qubits], radians.
                 cotangent: float[n_circuits, 2**n_qubits], dL/dp.
        Returns: float[n_circuits, n_layers, n_qubits], dL/dangle.
        Raises:  ShapeError: the cotangent does not fit the circuits.
        """
        if cotangent.shape != (angles.shape[0], 2 ** angles.shape[-1]):
            expected = f"[{angles.shape[0]}, 2**{angles.shape[-1]}]"
            raise ShapeError("cotangent", expected, str(list(cotangent.shape)))
        with torch.enable_grad():
            leaf = angles.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.probabilities(leaf), leaf, cotangent)
        return gradient
