"""backend: the native circuit on a device, or on whatever else implements Qiskit's BackendV2 or
BaseSamplerV2.

A backend's name is one of these:

    fake_torino        a fake backend of qiskit-ibm-runtime, a snapshot of a device that is simulated
    ibm_..             a device of IBM, with the account that qiskit-ibm-runtime has saved or finds in the
                       environment; qpa neither asks for credentials nor stores them
    module:callable    what the callable returns: a BackendV2 or a BaseSamplerV2

Rules:
1. IBM's backends run by `qiskit_ibm_runtime.executor_sampler.Sampler`, in a session or a batch where one is
   wanted; other backends by Qiskit's BackendSamplerV2.
2. The circuit was transpiled for a target that may have changed since: every operation must still be there.
3. A job that fails or is cancelled is submitted again, and one whose result was not reached is asked again,
   N_TRIES times in all, after pauses that double: a job that may have run is not paid for twice.

Source: Qiskit's primitives.
"""

from __future__ import annotations

import time
import weakref
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.circuits.circuit import Circuit
from qpa.circuits.operations import qubits_of
from qpa.circuits.sources.sampled import SampledSource
from qpa.circuits.sources.source import SourceSettings
from qpa.circuits.targets import fake_backend
from qpa.errors import OptionError, SourceError, TargetError, one_sentence

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.transpiler import Target

N_TRIES = 3
FIRST_PAUSE_S = 2.0
IBM, FAKE = "ibm_", "fake_"


@final
class BackendSource(SampledSource):
    """A device."""

    name: ClassVar[str] = "backend"
    runs_native: ClassVar[bool] = True
    needs_backend: ClassVar[bool] = True

    def __init__(self, settings: SourceSettings) -> None:
        """Take the settings; the backend is reached when it is needed.

        Raises:  OptionError: no backend is named, or a session or batch is wanted of one that has none.
        """
        super().__init__(settings)
        if settings.backend is None:
            raise OptionError("backend", "the name of a backend, for the source backend", "none")
        for mode in ("session", "batch"):
            if getattr(settings, mode) and not settings.backend.startswith(IBM):
                raise OptionError(mode, "a device of IBM, whose name starts with ibm_", settings.backend)
        if settings.session and settings.batch:
            raise OptionError("batch", "a session or a batch", "both")
        self.backend_name = settings.backend
        self.is_paid = settings.backend.startswith(IBM)
        self._backend: Any = None
        self._mode: Any = None
        self._checked: QuantumCircuit | None = None

    def sampler(self, circuit: Circuit, seed: int) -> tuple[Any, QuantumCircuit]:
        """Return the backend's sampler and the native circuit.

        Raises:  SourceError: the backend is not reached.
                 TargetError: the circuit is for another device, or for this one as it was.
        """
        from qiskit.primitives import BackendSamplerV2, BaseSamplerV2

        if self._backend is None:
            self._backend = find_backend(self.backend_name)
        if isinstance(self._backend, BaseSamplerV2):
            return self._backend, circuit.measured()
        if circuit.device is None and self._backend.coupling_map is not None:
            expected, advice = f"a run that is planned for {self.backend_name}", "name it with `target`"
            raise OptionError("source", expected, "a run for no device", advice)
        runs = circuit.measured()
        if self._checked is not runs:
            check_operations(runs, self._backend.target, self.backend_name)
            self._checked = runs
        if self.backend_name.startswith((IBM, FAKE)):
            return self._ibm_sampler(seed), runs
        options = {"seed_simulator": seed, "default_shots": self.shots}
        return BackendSamplerV2(backend=self._backend, options=options), runs

    def result(self, sampler: Any, units: list[Any]) -> Any:
        """Submit a job and wait for its result; try again where it fails.

        Raises:  SourceError: it failed every time.
        """
        pause_s, job = FIRST_PAUSE_S, None
        for n_left in reversed(range(N_TRIES)):
            try:
                job = job or sampler.run(units, shots=self.shots)
                return job.result()
            # A provider raises errors of its own for a lost connection, a job that is cancelled or late.
            except Exception as error:
                if not n_left:
                    subject, found = f"backend {self.backend_name}", one_sentence(error)
                    raise SourceError(subject, f"a job that ends, in {N_TRIES} tries", found) from error
                job = None if job is None or _has_failed(job) else job
            time.sleep(pause_s)
            pause_s *= 2
        raise AssertionError("every try returns or raises")

    def _ibm_sampler(self, seed: int) -> Any:
        from qiskit_ibm_runtime import Batch, Session
        from qiskit_ibm_runtime.executor_sampler import Sampler

        if self._mode is None:
            self._mode = self._backend
            if self.settings.session or self.settings.batch:
                kind = Session if self.settings.session else Batch
                self._mode = kind(backend=self._backend)
                # Otherwise it would be open, and paid for, until it expires.
                weakref.finalize(self, self._mode.close)
        sampler = Sampler(mode=self._mode)
        if self.backend_name.startswith(FAKE):
            sampler.options.simulator.seed_simulator = seed
        return sampler


def _has_failed(job: Any) -> bool:
    """Return whether a job is cancelled or failed; False where its provider cannot be asked."""
    try:
        return bool(job.cancelled() or getattr(job, "errored", lambda: False)())
    # The connection that was lost may still be.
    except Exception:
        return False


def find_backend(name: str) -> Any:
    """Return the backend or sampler of a name, see the module.

    Raises:  OptionError: the name is of none of the kinds, or what it names is no backend.
             TargetError: there is no fake backend of this name.
             SourceError: the backend is not reached, or there are no credentials.
    """
    from qiskit.primitives import BaseSamplerV2
    from qiskit.providers import BackendV2

    if name.startswith(FAKE):
        return fake_backend(name)
    if name.startswith(IBM):
        return _ibm_backend(name)
    module, colon, attribute = name.partition(":")
    if not colon:
        expected = "fake_.., ibm_.. or module:callable"
        raise OptionError("backend", expected, name)
    try:
        found = getattr(import_module(module), attribute)()
    # The module and the callable are the user's, and raise what they like.
    except Exception as error:
        raise OptionError("backend", f"a callable {attribute} of {module}", one_sentence(error)) from error
    if not isinstance(found, BackendV2 | BaseSamplerV2):
        expected = f"a BackendV2 or a BaseSamplerV2 from {name}"
        raise OptionError("backend", expected, type(found).__name__)
    return found


def _ibm_backend(name: str) -> Any:
    try:
        from qiskit_ibm_runtime import QiskitRuntimeService
    except ModuleNotFoundError as error:
        advice = "pip install 'qpa[ibm]'"
        raise OptionError("backend", "qiskit-ibm-runtime, for a device of IBM", "none", advice) from error
    try:
        return QiskitRuntimeService().backend(name)
    # Whatever the service raises: no account, no network, no such device.
    except Exception as error:
        advice = (
            "save an account once with QiskitRuntimeService.save_account, or set QISKIT_IBM_TOKEN; "
            "qpa does not read or keep credentials"
        )
        raise SourceError(
            f"backend {name}", "a device that is reached", one_sentence(error), advice
        ) from error


def check_operations(circuit: QuantumCircuit, target: Target, name: str) -> None:
    """Check that a target has every operation of a native circuit.

    Raises:  TargetError: a qubit, coupling or gate is not there.
    """
    for step in circuit.data:
        qubits = qubits_of(step, circuit)
        if step.operation.name == "barrier" or target.instruction_supported(step.operation.name, qubits):
            continue
        where = f"qubit {qubits[0]}" if len(qubits) == 1 else f"qubits {', '.join(map(str, qubits))}"
        expected = f"{step.operation.name} on {where}, as when the circuit was transpiled"
        advice = "run `qpa transpile` with `target` again"
        raise TargetError(f"backend {name}", expected, "none", advice)
