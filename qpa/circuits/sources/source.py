"""What a source is: something that runs circuits and gives the probabilities of their basis states."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from qpa.circuits.circuit import Circuit
from qpa.errors import ShapeError
from qpa.registry import Registry
from qpa.seeds import split_seed

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_SHOTS = 8192
MAX_EXECUTIONS = 10_000_000
"""The most executions of one job, after broadcasting; that of IBM's sampler."""


class Cost(NamedTuple):
    """What a call of a source costs.

    Args:    n_circuits: the number of circuits that are run, each with angles of its own.
             n_executions: the number of runs, where every shot counts as one; n_circuits for an exact source.
             n_jobs: the number of jobs in which they travel.
    """

    n_circuits: int
    n_executions: int
    n_jobs: int

    def times(self, n: int) -> Cost:
        """Return what so many of these calls cost."""
        return Cost(*(n * part for part in self))


def total(*costs: Cost) -> Cost:
    """Return what several calls cost together."""
    return Cost(*map(sum, zip(*costs, strict=True)))


def jobs_for(n_evaluations: int, shots: int) -> int:
    """Return in how many jobs the sets of angles of one call travel."""
    return -(-n_evaluations // max(1, MAX_EXECUTIONS // shots))


@dataclass(frozen=True)
class SourceSettings:
    """What a source is made with; it refuses what it cannot use.

    Args:    seed: determines everything that is random in it. What is drawn for angles is a function of the
             seed and these angles, so that a training that is resumed draws the same.
             shots: of every circuit; None is the source's own choice.
             backend: the name of a backend, for a source that runs on one.
             session, batch: whether all jobs of the source share a session, or a batch, of the backend.
    """

    seed: int = 0
    shots: int | None = None
    backend: str | None = None
    session: bool = False
    batch: bool = False


class Source(Protocol):
    """A simulator, a sampler or a device; all of them are used alike.

    Class attributes: `name` is how a user asks for it; `is_differentiable` says whether autograd
    reaches the angles through `probabilities`; `runs_native` says whether it runs the circuit in the target's
    own gates, which must be loaded then; `needs_backend` says whether it wants the name of a backend.
    `is_paid` says whether a run may cost money. `shots`, those of every circuit, is None for exact
    probabilities.
    Source:  ours.
    """

    name: ClassVar[str]
    is_differentiable: ClassVar[bool]
    runs_native: ClassVar[bool]
    needs_backend: ClassVar[bool]
    is_paid: bool
    shots: int | None

    def __init__(self, settings: SourceSettings) -> None: ...

    def probabilities(self, circuit: Circuit, angles: Tensor) -> Tensor:
        """Run one circuit with many sets of angles, all in one call and so in one job where that is possible.

        Args:    angles: float[n_evaluations, n_angles], radians.
        Returns: float[n_evaluations, 2**n_qubits], rows sum to 1; qubit 0 is the most significant bit. Where
                 there are shots, they are counts divided by the number of shots.
        Raises:  ShapeError: the angles are not the circuit's.
                 SourceError: what runs the circuits fails.
        """
        ...

    def cost(self, circuit: Circuit, n_evaluations: int) -> Cost:
        """Return what a call with so many sets of angles costs, before it is made.

        Raises:  OptionError: the source cannot run this circuit.
        """
        ...


SOURCES: Registry[type[Source]] = Registry(
    "source",
    {
        "exact": "qpa.circuits.sources.exact:ExactSimulator",
        "shots": "qpa.circuits.sources.shots:ShotSimulator",
        "noisy": "qpa.circuits.sources.noisy:NoisySimulator",
        "backend": "qpa.circuits.sources.backend:BackendSource",
    },
)


def seed_of_angles(seed: int, angles: Tensor, *uses: str) -> int:
    """Return the 63-bit seed from which is drawn for angles, see `SourceSettings`.

    Args:    uses: what else tells one use of the angles from another.
    """
    digest = hashlib.sha256(angles.detach().cpu().double().numpy().tobytes()).hexdigest()
    return split_seed(seed, " ".join((digest, *uses)))


def check_angles(circuit: Circuit, angles: Tensor) -> None:
    """Check that angles are a circuit's.

    Raises:  ShapeError: they are not float[n_evaluations, n_angles].
    """
    if angles.dim() != 2 or angles.shape[1] != circuit.n_angles or not len(angles):
        expected = f"[n_evaluations, {circuit.n_angles}], at least one row"
        raise ShapeError("angles", expected, str(list(angles.shape)))
