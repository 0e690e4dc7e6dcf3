"""The chain's probabilities in numpy are those of the simulator, with bits that are pinned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.serve.circuits import ANSATZ, chain_probabilities


@pytest.mark.parametrize(("n_qubits", "n_layers", "n_circuits"), [(1, 3, 2), (2, 1, 1), (5, 4, 3), (9, 2, 2)])
def test_probabilities_are_those_of_the_simulator(n_qubits, n_layers, n_circuits):
    random = torch.Generator().manual_seed(n_qubits)
    angles = torch.randn(n_circuits, n_layers * n_qubits, generator=random, dtype=torch.float64) * 2
    found = chain_probabilities(angles.numpy(), n_qubits)
    expected = Circuit(make_ansatz(ANSATZ, n_qubits, n_layers)).exact_probabilities(angles)
    assert found.dtype == np.float64
    assert np.abs(found - expected.double().numpy()).max() < 1e-6
    assert np.abs(found.sum(1) - 1).max() < 1e-13


def test_the_bits_are_pinned():
    angles = np.array([[0.3, -1.2, 2.0, 0.7, 0.25, -3.0]])
    found = [number.hex() for number in chain_probabilities(angles, 2)[0].tolist()]
    assert found == PINNED


PINNED = ["0x1.00c8f982fcc5fp-4", "0x1.b64b81b175883p-2", "0x1.16378422e894ap-6", "0x1.f81ec7ab9cbd2p-2"]
