"""ry-cnot-chain: layers of RY on every qubit, each followed by a linear chain of CNOTs.

|0..0>, then n_layers times [RY(t[layer * n_qubits + qubit]) on every qubit; CNOT(0,1) .. CNOT(n-2,n-1)].

RY and CNOT are real, and so the amplitudes are. The chain maps a basis state's bits to their prefix sums
modulo 2, which is the gather new[y] = old[y ^ (y >> 1)].

Source: arXiv 2410.09846, section 3; bit order ours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, final

from qpa.circuits.ansatz import AnsatzKind, parameters
from qpa.documents import Ansatz

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from torch import Tensor

MAX_DENSE_QUBITS = 7
"""The most qubits for which a matrix of side 2**n_qubits per layer is faster (`benchmarks.circuit_time`)."""


@final
class RyCnotChain(AnsatzKind):
    """The chain of the paper.

    The exact simulation has two forms, each with a backward pass of its own:
    `qpa.circuits.sources.dense_chain` is faster for up to seven qubits,
    `qpa.circuits.sources.kronecker_chain` beyond.
    """

    name: ClassVar[str] = "ry-cnot-chain"
    words: ClassVar[str] = "RY and a chain of CNOTs, the fastest to simulate"
    entanglement: ClassVar[str] = "linear"
    # Amplitudes of random real states are normal: the mean is that of |N(0, 1)|.
    feature_mean: ClassVar[float] = math.sqrt(2 / math.pi)

    def n_angles(self, n_qubits: int, n_layers: int) -> int:
        """Return the number of angles, one for each qubit in each layer."""
        return n_layers * n_qubits

    def build(self, ansatz: Ansatz, *, has_last_layer: bool = True) -> QuantumCircuit:
        """Return the chain; its angle i is that of qubit i % n_qubits in layer i // n_qubits."""
        from qiskit import QuantumCircuit

        n_layers, n_qubits = ansatz.n_layers, ansatz.n_qubits
        angles = parameters(ansatz)
        circuit = QuantumCircuit(n_qubits, name=f"{ansatz.kind}-{n_layers}x{n_qubits}")
        for layer in range(n_layers):
            for qubit in range(n_qubits):
                circuit.ry(angles[layer * n_qubits + qubit], qubit)
            if layer < n_layers - 1 or has_last_layer:
                for qubit in range(n_qubits - 1):
                    circuit.cx(qubit, qubit + 1)
        return circuit

    def probabilities(self, ansatz: Ansatz, angles: Tensor) -> Tensor:
        """Simulate the chain by the form that is faster for its number of qubits."""
        from qpa.circuits.sources.dense_chain import DenseChain
        from qpa.circuits.sources.kronecker_chain import KroneckerChain

        chain = DenseChain if ansatz.n_qubits <= MAX_DENSE_QUBITS else KroneckerChain
        by_layer = angles.view(len(angles), ansatz.n_layers, ansatz.n_qubits)
        probabilities: Tensor = chain.apply(by_layer)  # type: ignore[no-untyped-call]
        return probabilities

    def window_angles(self, ansatz: Ansatz, bits: Tensor) -> Tensor:
        """Return the angles of a product state that the last layer alone prepares.

        It is RY(0) or RY(pi) on the qubits that number windows and RY(pi/2) on the others. The CNOTs after it
        map bits to prefix sums modulo 2, so each of the former is turned by the difference of two
        neighbouring bits.
        """
        n_circuits, n_window_qubits = bits.shape
        flips = bits.clone()
        flips[:, 1:] = (bits[:, 1:] - bits[:, :-1]).abs()
        angles = bits.new_zeros(n_circuits, ansatz.n_layers, ansatz.n_qubits)
        angles[:, -1, :n_window_qubits] = math.pi * flips
        angles[:, -1, n_window_qubits:] = math.pi / 2
        return angles.flatten(1)

    def last_layer_permutation(self, ansatz: Ansatz) -> Tensor:
        """Return the gather of the last chain of CNOTs."""
        return chain_gather(ansatz.n_qubits)


def chain_gather(n_qubits: int) -> Tensor:
    """Return what a chain of CNOTs does to the basis states: new[y] = old[gather[y]].

    Returns: int64[2**n_qubits].
    """
    import torch

    index = torch.arange(2**n_qubits)
    return index ^ (index >> 1)


RY_CNOT_CHAIN = RyCnotChain()
