"""What circuits become on several devices, at every level of Qiskit's transpiler.

    python -m benchmarks.devices

The circuits end before their last entangling layer, as `qpa plan` makes them, and are transpiled with one
seed; the last column takes the best of four seeds by estimated success probability (`--layouts 4`).
"""

from __future__ import annotations

from qiskit import QuantumCircuit
from qiskit.transpiler import generate_preset_pass_manager

from qpa.bench.report import markdown_table
from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.qiskit_files import to_qiskit
from qpa.circuits.targets import Device, duration_s, find_device, success_probability

TARGETS = ("fake_torino", "fake_sherbrooke", "fake_fez", "generic:27", "ions:27")
SHAPES = ((7, 8), (11, 5))
N_SEEDS = 4


def transpiled(circuit: QuantumCircuit, device: Device, level: int, seed: int) -> QuantumCircuit:
    """Return a circuit in the gates of a device."""
    passes = generate_preset_pass_manager(level, target=device.target, seed_transpiler=seed)
    return passes.run(circuit)


def main() -> None:
    """Print the table."""
    rows: list[tuple[str, ...]] = [
        ("qubits x layers", "device", "level", "two-qubit gates", "depth", "success", "run, us", "best of 4")
    ]
    for n_qubits, n_layers in SHAPES:
        circuit = to_qiskit(make_ansatz("ry-cnot-chain", n_qubits, n_layers), has_last_layer=False)
        for name in TARGETS:
            device = find_device(name)
            assert device is not None
            for level in range(4):
                natives = [transpiled(circuit, device, level, seed) for seed in range(N_SEEDS)]
                scores = [success_probability(native, device.target) or 0.0 for native in natives]
                native, length_s = natives[0], duration_s(natives[0], device.target)
                n_pairs = sum(len(step.qubits) == 2 for step in native.data)
                rows.append(
                    (
                        *(f"{n_qubits} x {n_layers}", name, str(level), str(n_pairs), str(native.depth())),
                        f"{scores[0]:.3f}",
                        "-" if length_s is None else f"{1e6 * length_s:.1f}",
                        f"{max(scores):.3f}",
                    )
                )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
