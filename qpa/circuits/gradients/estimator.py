"""What a gradient estimator is: it pulls a cotangent back through a source.

Estimators differ in how they estimate and share how circuits are run: whatever they need run goes to the
source in one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.source import Source
from qpa.errors import ShapeError
from qpa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class GradientEstimator(Protocol):
    """A way to estimate gradients of a source's probabilities.

    An estimator is made with a seed, which determines everything that is random in it: what is drawn for
    angles is a function of the seed and these angles, so that a training that is resumed draws the same.

    Class attributes: `name` is how a user asks for it; `needs_differentiable` says whether it works only with
    sources through which autograd reaches the angles.
    Source:  ours.
    """

    name: ClassVar[str]
    needs_differentiable: ClassVar[bool]

    def __init__(self, seed: int) -> None: ...

    def vjp(
        self, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor, cotangent: Tensor
    ) -> Tensor:
        """Pull a gradient of the probabilities back to the angles.

        Args:    angles: float[n_circuits, n_angles], radians.
                 measured: float[n_circuits, 2**n_qubits], what the source gave for these angles.
                 cotangent: float[n_circuits, 2**n_qubits], dL/dp.
        Returns: float[n_circuits, n_angles], dL/dangle.
        Raises:  ShapeError: the cotangent does not fit the circuits.
        """
        ...

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return how many sets of angles one `vjp` asks the source to run."""
        ...


GRADIENTS: Registry[type[GradientEstimator]] = Registry(
    "gradient",
    {
        "adjoint": "qpa.circuits.gradients.adjoint:Adjoint",
        "parameter-shift": "qpa.circuits.gradients.parameter_shift:ParameterShift",
        "surrogate": "qpa.circuits.gradients.surrogate:Surrogate",
        "spsa": "qpa.circuits.gradients.spsa:Spsa",
    },
)


def check_cotangent(circuit: Circuit, angles: Tensor, cotangent: Tensor) -> None:
    """Check that a cotangent is one of the circuits' probabilities.

    Raises:  ShapeError: it is not float[n_circuits, 2**n_qubits].
    """
    if cotangent.shape != (len(angles), circuit.n_states):
        expected = f"[{len(angles)}, {circuit.n_states}]"
        raise ShapeError("cotangent", expected, str(list(cotangent.shape)))
