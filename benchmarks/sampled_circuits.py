"""What benchmarks of sampled circuits have in common: one circuit, transpiled for a device."""

from __future__ import annotations

from qiskit.transpiler import generate_preset_pass_manager

from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.qiskit_files import to_qiskit
from qpa.circuits.targets import find_device

SEED = 1


def circuit_on(target: str, n_qubits: int, n_layers: int, ansatz: str = "ry-cnot-chain") -> Circuit:
    """Return a circuit without its last entangling layer, in the gates of a device.

    Args:    target: a name that `find_device` knows, not "none".
    """
    shape, device = make_ansatz(ansatz, n_qubits, n_layers), find_device(target)
    assert device is not None
    logical = to_qiskit(shape, has_last_layer=False)
    native = generate_preset_pass_manager(3, target=device.target, seed_transpiler=SEED).run(logical)
    return Circuit(shape, native, device, lacks_last_layer=True)
