"""An ansatz from outside: layers of RY, each followed by CZs of every other pair of neighbours."""

from __future__ import annotations

import math

import torch
from qiskit import QuantumCircuit

from qpa.circuits.ansatz import AnsatzKind, parameters


class RyCzBricks(AnsatzKind):
    """Even layers entangle qubits 0 and 1, 2 and 3, and so on; odd layers 1 and 2, 3 and 4, and so on."""

    name = "ry-cz-bricks"
    entanglement = "bricks"
    feature_mean = math.sqrt(2 / math.pi)

    def n_angles(self, n_qubits, n_layers):
        return n_layers * n_qubits

    def build(self, ansatz, *, has_last_layer=True):
        n_qubits, angles = ansatz.n_qubits, parameters(ansatz)
        circuit = QuantumCircuit(n_qubits, name=self.name)
        for layer in range(ansatz.n_layers):
            for qubit in range(n_qubits):
                circuit.ry(angles[layer * n_qubits + qubit], qubit)
            if layer < ansatz.n_layers - 1 or has_last_layer:
                for qubit in range(layer % 2, n_qubits - 1, 2):
                    circuit.cz(qubit, qubit + 1)
        return circuit

    def window_angles(self, ansatz, bits):
        angles = bits.new_zeros(len(bits), ansatz.n_layers, ansatz.n_qubits)
        angles[:, -1, : bits.shape[1]] = math.pi * bits
        angles[:, -1, bits.shape[1] :] = math.pi / 2
        return angles.flatten(1)

    def last_layer_permutation(self, ansatz):
        return torch.arange(2**ansatz.n_qubits)
