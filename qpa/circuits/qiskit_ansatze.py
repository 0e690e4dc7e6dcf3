"""Layers of rotations and two-qubit gates, as functions of Qiskit's circuit library build them.

|0..0>, then n_layers times [RY on every qubit; RZ on every qubit, if the kind has it; two-qubit gates]:

* ry-cz-ring: RY; CZ of each qubit and the next, and of the last and the first. It is
  n_local(n, "ry", "cz", "circular"), up to the order of the CZs, which commute.
* real-amplitudes-full: RY; CNOT(i, j) of all i < j. It is real_amplitudes(n, "full"). All CNOTs of a layer
  together are those of a chain, CNOT(n-2, n-1) .. CNOT(0, 1), which Qiskit calls "reverse_linear", and so the
  inverse of those of ry-cnot-chain. That is real_amplitudes(n, "linear").
* efficient-su2: RY, RZ; CNOT(0, 1) .. CNOT(n-2, n-1). It is efficient_su2(n, "linear"); Qiskit's own default
  is "reverse_linear". The last layer has no RZ: phases are all that it would change, the CNOTs after it
  permute basis states, and so the probabilities would be the same.

Qiskit's functions are called with skip_final_rotation_layer=True. Angles are in the order of the gates: those
of a layer's RYs by qubit, then those of its RZs by qubit.

Source: arXiv 1704.05049 for layers of rotations and entangling gates; Qiskit's circuit library for the kinds;
bit order ours.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, final

from qpa.circuits.ansatz import AnsatzKind, make_ansatz, parameters
from qpa.documents import Ansatz

if TYPE_CHECKING:
    import torch
    from qiskit import QuantumCircuit
    from torch import Tensor


class RotationLayers(AnsatzKind):
    """Layers of rotations of every qubit, each followed by the same two-qubit gates.

    Class attributes: `gate` is the two-qubit gate, by the name of Qiskit's method; `has_rz` says whether
    every layer but the last has RZ after RY, which makes the amplitudes complex.
    """

    gate: ClassVar[Literal["cx", "cz"]]
    has_rz: ClassVar[bool] = False
    # Amplitudes of random real states are normal: the mean is that of |N(0, 1)|.
    feature_mean: ClassVar[float] = math.sqrt(2 / math.pi)

    @abstractmethod
    def pairs(self, n_qubits: int) -> list[tuple[int, int]]:
        """Return the qubits of a layer's two-qubit gates, in order.

        Of CNOTs the control comes first and before the target, so that no qubit depends on later ones.
        """

    def n_angles(self, n_qubits: int, n_layers: int) -> int:
        """Return the number of angles: of RY in each layer, of RZ in each but the last."""
        return n_qubits * (2 * n_layers - 1 if self.has_rz else n_layers)

    def build(self, ansatz: Ansatz, *, has_last_layer: bool = True) -> QuantumCircuit:
        """Return the circuit; its angles are in the order of its gates."""
        from qiskit import QuantumCircuit

        n_layers, n_qubits = ansatz.n_layers, ansatz.n_qubits
        angles = iter(parameters(ansatz))
        circuit = QuantumCircuit(n_qubits, name=f"{ansatz.kind}-{n_layers}x{n_qubits}")
        for layer in range(n_layers):
            is_last = layer == n_layers - 1
            for qubit in range(n_qubits):
                circuit.ry(next(angles), qubit)
            if self.has_rz and not is_last:
                for qubit in range(n_qubits):
                    circuit.rz(next(angles), qubit)
            if has_last_layer or not is_last:
                for pair in self.pairs(n_qubits):
                    getattr(circuit, self.gate)(*pair)
        return circuit

    def probabilities(self, ansatz: Ansatz, angles: Tensor) -> Tensor:
        """Simulate the circuit layer by layer, which takes a fraction of the time of gate by gate."""
        from torch.nn.functional import pad

        from qpa.circuits.sources.rotation_layers import simulate_layers

        n_layers, n_qubits = ansatz.n_layers, ansatz.n_qubits
        if not self.has_rz:
            ry = angles.view(len(angles), n_layers, n_qubits)
            return simulate_layers(ry.transpose(0, 1), None, self._entangle)
        padded = pad(angles, (0, n_qubits)).view(len(angles), n_layers, 2, n_qubits)
        ry, rz = padded.permute(2, 1, 0, 3)
        return simulate_layers(ry, rz, self._entangle)

    def window_angles(self, ansatz: Ansatz, bits: Tensor) -> Tensor:
        """Return the angles of a product state that the last layer's RYs alone prepare.

        They are RY(0) or RY(pi) on the qubits that number windows and RY(pi/2) on the others. The former are
        turned to the bits that the two-qubit gates make the window's bits of; whatever these gates do to the
        latter, their superposition stays uniform.
        """
        n_circuits, n_window_qubits = bits.shape
        states = bits.new_zeros(n_circuits, ansatz.n_qubits)
        states[:, :n_window_qubits] = bits
        flips = self._bits_before(states.bool()).to(bits.dtype)
        angles = bits.new_zeros(n_circuits, ansatz.n_angles)
        last_ry = angles[:, -ansatz.n_qubits :]
        last_ry[:, :n_window_qubits] = math.pi * flips[:, :n_window_qubits]
        last_ry[:, n_window_qubits:] = math.pi / 2
        return angles

    def last_layer_permutation(self, ansatz: Ansatz) -> Tensor:
        """Return the gather of the last CNOTs; that of CZs leaves everything in its place."""
        import torch

        from qpa.circuits.sources.rotation_layers import bits_of_states

        before = self._bits_before(bits_of_states(ansatz.n_qubits))
        index = before.new_zeros(len(before), dtype=torch.int64)
        for bit in before.unbind(1):
            index = 2 * index + bit
        return index

    def _bits_before(self, bits: Tensor) -> Tensor:
        """Return the bits, bool[n_states, n_qubits], that a layer's two-qubit gates turn into those given."""
        before = bits.clone()
        if self.gate == "cx":
            for control, target in reversed(self.pairs(bits.shape[1])):
                before[:, target] ^= before[:, control]
        return before

    def _entangle(self, state: Tensor) -> Tensor:
        """Apply a layer's two-qubit gates to states [n_circuits, 2**n_qubits]."""
        n_qubits = state.shape[1].bit_length() - 1
        if self.gate == "cz":
            return state * _signs(self, n_qubits, state.device, state.dtype)
        return state.index_select(1, _gather(self, n_qubits, state.device))


@lru_cache(maxsize=64)
def _gather(kind: RotationLayers, n_qubits: int, device: torch.device) -> Tensor:
    """Return what a layer's CNOTs do to the basis states: new[y] = old[gather[y]]."""
    return kind.last_layer_permutation(make_ansatz(kind.name, n_qubits, n_layers=1)).to(device)


@lru_cache(maxsize=64)
def _signs(kind: RotationLayers, n_qubits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what a layer's CZs do to the basis states: -1 where an odd number of them has two bits of 1."""
    from qpa.circuits.sources.rotation_layers import bits_of_states

    bits = bits_of_states(n_qubits)
    is_odd = bits.new_zeros(len(bits))
    for one, other in kind.pairs(n_qubits):
        is_odd ^= bits[:, one] & bits[:, other]
    return 1 - 2 * is_odd.to(device, dtype)


@final
class RyCzRing(RotationLayers):
    """RY, and a ring of CZs: one CZ for two qubits, none for one.

    From three qubits on, and however many layers there are, the probabilities have at most n (n - 1) degrees
    of freedom, one more for odd n: RYs and a ring of CZs generate a Lie algebra that grows only with the
    square of n. More than n layers add angles and nothing else. Those of other kinds have all 2**n - 1.
    """

    name: ClassVar[str] = "ry-cz-ring"
    words: ClassVar[str] = "RY and a ring of CZs, up to 5 times as slow"
    entanglement: ClassVar[str] = "ring"
    # Its states never are random ones. Measured with 7 to 9 qubits and 8 to 20 layers: 0.72 to 0.78.
    feature_mean: ClassVar[float] = 0.75
    gate: ClassVar[Literal["cx", "cz"]] = "cz"

    def pairs(self, n_qubits: int) -> list[tuple[int, int]]:
        """Return every other pair of neighbours, then the rest, so that the ring's depth is 2 or 3."""
        n_pairs = n_qubits if n_qubits > 2 else n_qubits - 1
        first_qubits = (*range(0, n_pairs, 2), *range(1, n_pairs, 2))
        return [(qubit, (qubit + 1) % n_qubits) for qubit in first_qubits]


@final
class RealAmplitudesFull(RotationLayers):
    """RY, and CNOTs of all pairs of qubits."""

    name: ClassVar[str] = "real-amplitudes-full"
    words: ClassVar[str] = "RY and CNOTs of all pairs, up to 5 times as slow"
    entanglement: ClassVar[str] = "full"
    gate: ClassVar[Literal["cx", "cz"]] = "cx"

    def pairs(self, n_qubits: int) -> list[tuple[int, int]]:
        """Return all pairs, in the order of their first qubits."""
        return [*combinations(range(n_qubits), 2)]


@final
class EfficientSu2(RotationLayers):
    """RY and RZ, and a chain of CNOTs."""

    name: ClassVar[str] = "efficient-su2"
    words: ClassVar[str] = "RY, RZ and a chain of CNOTs: complex amplitudes, up to 8 times as slow"
    entanglement: ClassVar[str] = "linear"
    # The squares of random complex amplitudes, times 2**n, are exponential: the mean is that of their root.
    feature_mean: ClassVar[float] = math.gamma(1.5)
    gate: ClassVar[Literal["cx", "cz"]] = "cx"
    has_rz: ClassVar[bool] = True

    def pairs(self, n_qubits: int) -> list[tuple[int, int]]:
        """Return the pairs of neighbours."""
        return [*pairwise(range(n_qubits))]


RY_CZ_RING = RyCzRing()
REAL_AMPLITUDES_FULL = RealAmplitudesFull()
EFFICIENT_SU2 = EfficientSu2()
