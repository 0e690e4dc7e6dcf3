"""The probabilities of the ansatz ry-cnot-chain, in numpy and with the same bits everywhere.

|0..0>, then n_layers times [RY on every qubit; CNOT(0,1), CNOT(1,2) .. CNOT(n-2,n-1)]. RY(t) turns the
amplitudes of a qubit's two values by t / 2, and the chain takes the amplitude of y from y ^ (y >> 1). Qubit 0
is the most significant bit of a basis state.

Source: arXiv 2410.09846, section 3; bit order ours, as in `qpa.circuits.ry_cnot_chain`.
"""

from __future__ import annotations

import math

import numpy as np

from qpa.serve.arithmetic import Array, sin_cos

ANSATZ = "ry-cnot-chain"

FEATURE_MEAN = math.sqrt(2 / math.pi)
"""The mean root feature of uniformly drawn angles, which is subtracted where there are no windows."""


def chain_probabilities(angles: Array, n_qubits: int) -> Array:
    """Return float64[n_circuits, 2**n_qubits].

    Args:    angles: [n_circuits, n_layers * n_qubits], radians; angle i is that of qubit i % n_qubits in
             layer i // n_qubits.
    """
    sines, cosines = sin_cos(angles * 0.5)
    n_circuits, n_angles = angles.shape
    amplitudes = np.zeros((n_circuits, 2**n_qubits))
    amplitudes[:, 0] = 1.0
    index = np.arange(2**n_qubits)
    chain = index ^ (index >> 1)
    for number in range(n_angles):
        qubit = number % n_qubits
        pairs = amplitudes.reshape(n_circuits, 2**qubit, 2, -1)
        zero, one = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        sine, cosine = sines[:, number, None, None], cosines[:, number, None, None]
        pairs[:, :, 0] = cosine * zero - sine * one
        pairs[:, :, 1] = sine * zero + cosine * one
        if qubit == n_qubits - 1:
            amplitudes = amplitudes[:, chain]
    return amplitudes * amplitudes
