"""noisy: the native circuit with the errors of its device, sampled by Aer.

Rules:
1. The noise is made from the device as the plan keeps it: gate errors as depolarising channels, relaxation of
   the qubits over the gates' durations, and readout errors.
2. Only the qubits that the circuit uses are simulated, and only their errors are read.
3. Up to MAX_DENSITY_QUBITS qubits the density matrix is simulated, of which shots are cheap; above, a
   trajectory for each shot.

Source: Aer's device noise models.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.aer import aer_sampler
from qpa.circuits.sources.sampled import SampledSource
from qpa.circuits.sources.source import Cost, SourceSettings
from qpa.circuits.targets import restrict
from qpa.errors import OptionError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.transpiler import Target

    from qpa.circuits.targets import Device

MAX_DENSITY_QUBITS = 12
"""At 11 a density matrix takes 5 s and 8,192 trajectories take 45 s (`benchmarks.source_time`)."""


@final
class NoisySimulator(SampledSource):
    """A device with its errors, as its calibration describes them."""

    name: ClassVar[str] = "noisy"
    runs_native: ClassVar[bool] = True

    def __init__(self, settings: SourceSettings) -> None:
        """Take the settings."""
        super().__init__(settings)
        self._made: tuple[Circuit, Any, QuantumCircuit] | None = None

    def cost(self, circuit: Circuit, n_evaluations: int) -> Cost:
        """Return the cost, see `SampledSource.cost`.

        Raises:  OptionError: the circuit was not transpiled to a device.
        """
        _device(circuit)
        return super().cost(circuit, n_evaluations)

    def sampler(self, circuit: Circuit, seed: int) -> tuple[Any, QuantumCircuit]:
        """Return Aer's sampler with the noise, and the native circuit on the qubits that it uses.

        Raises:  OptionError: the circuit was not transpiled to a device.
        """
        if self._made is None or self._made[0] is not circuit:
            self._made = (circuit, *_with_noise(circuit))
        _, noise, runs = self._made
        method = "density_matrix" if runs.num_qubits <= MAX_DENSITY_QUBITS else "statevector"
        return aer_sampler(seed, noise_model=noise, method=method), runs


def _device(circuit: Circuit) -> Device:
    """Return the device of a circuit in its own gates.

    Raises:  OptionError: the circuit was not transpiled to a device.
    """
    if circuit.native is None or circuit.device is None:
        expected = "a run that is planned for a device, for noisy"
        raise OptionError("source", expected, "a run for no device", "name one with `target`")
    return circuit.device


def _with_noise(circuit: Circuit) -> tuple[Any, QuantumCircuit]:
    """Return the noise model and the circuit, both on the qubits that are used."""
    device = _device(circuit)
    runs, target = restrict(circuit.measured(), device.target)
    return noise_model(target), runs


def noise_model(target: Target) -> Any:
    """Return Aer's noise model of a target."""
    from qiskit.providers import BackendV2, Options
    from qiskit_aer.noise import NoiseModel

    class Shell(BackendV2):  # type: ignore[misc]  # Aer reads a backend's target, and runs nothing on it
        target = property(lambda self: target)
        max_circuits = None

        @classmethod
        def _default_options(cls) -> Options:
            return Options()

        def run(self, run_input: Any, **options: Any) -> None:
            raise NotImplementedError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of qubits whose relaxation is not known
        return NoiseModel.from_backend(Shell())
