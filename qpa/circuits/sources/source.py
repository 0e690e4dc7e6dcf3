"""What a source is: something that runs circuits and gives the probabilities of their basis states."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from qpa.circuits.circuit import Circuit
from qpa.errors import ShapeError
from qpa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class Cost(NamedTuple):
    """What a call of a source costs.

    Args:    n_circuits: the number of circuits that are run, each with angles of its own.
             n_executions: the number of runs, where every shot counts as one; n_circuits for an exact source.
             n_jobs: the number of jobs in which they travel.
    """

    n_circuits: int
    n_executions: int
    n_jobs: int


class Source(Protocol):
    """A simulator, a sampler or a device; all of them are used alike.

    A source is made with a seed, which determines everything that is random in it.

    Class attributes: `name` is how a user asks for it; `is_differentiable` says whether autograd
    reaches the angles through `probabilities`; `runs_native` says whether it runs the circuit in the target's
    own gates, which must be loaded then. `shots`, those of every circuit, is None for exact probabilities.
    Source:  ours.
    """

    name: ClassVar[str]
    is_differentiable: ClassVar[bool]
    runs_native: ClassVar[bool]
    shots: int | None

    def __init__(self, seed: int) -> None: ...

    def probabilities(self, circuit: Circuit, angles: Tensor) -> Tensor:
        """Run one circuit with many sets of angles, all in one call and so in one job where that is possible.

        Args:    angles: float[n_evaluations, n_angles], radians.
        Returns: float[n_evaluations, 2**n_qubits], rows sum to 1; qubit 0 is the most significant bit.
        Raises:  ShapeError: the angles are not the circuit's.
        """
        ...

    def cost(self, circuit: Circuit, n_evaluations: int) -> Cost:
        """Return what a call with so many sets of angles costs, before it is made."""
        ...


SOURCES: Registry[type[Source]] = Registry("source", {"exact": "qpa.circuits.sources.exact:ExactSimulator"})


def check_angles(circuit: Circuit, angles: Tensor) -> None:
    """Check that angles are a circuit's.

    Raises:  ShapeError: they are not float[n_evaluations, n_angles].
    """
    if angles.dim() != 2 or angles.shape[1] != circuit.n_angles or not len(angles):
        expected = f"[n_evaluations, {circuit.n_angles}], at least one row"
        raise ShapeError("angles", expected, str(list(angles.shape)))
