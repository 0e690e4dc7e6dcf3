"""What a gradient estimator is: it pulls a cotangent back through a source.

Estimators differ in how they estimate and share how circuits are run: whatever they need run goes to the
source in one call.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qpa.circuits.circuit import Circuit
from qpa.circuits.sources.source import Source
from qpa.errors import ShapeError
from qpa.registry import Registry


class GradientEstimator(Protocol):
    """A way to estimate gradients of a source's probabilities.

    An estimator is made with a seed, of which everything that is random in it is a function.

    Class attributes: `name` is how a user asks for it; `needs_differentiable`: it works with sources alone
    through which autograd reaches the angles.
    Source:  ours.
    """

    name: ClassVar[str]
    needs_differentiable: ClassVar[bool]

    def __init__(self, seed: int) -> None: ...

    def vjp(self, source: Source, circuit: Circuit, angles: Tensor, cotangent: Tensor) -> Tensor:
        """Pull a gradient of the probabilities back to the angles.

        Args:    angles: float[n_circuits, n_angles], radians.
                 cotangent: float[n_circuits, 2**n_qubits], dL/dp.
        Returns: float[n_circuits, n_angles], dL/dangle.
        Raises:  ShapeError: the cotangent does not fit the circuits.
        """
        ...

    def n_evaluations(self, circuit: Circuit, n_circuits: int) -> int:
        """Return how many runs with angles of their own a `vjp` asks the source for."""
        ...


GRADIENTS: Registry[type[GradientEstimator]] = Registry(
    "gradient",
    {
        "adjoint": "qpa.circuits.gradients.adjoint:Adjoint",
        "parameter-shift": "qpa.circuits.gradients.parameter_shift:ParameterShift",
    },
)


def check_cotangent(circuit: Circuit, angles: Tensor, cotangent: Tensor) -> None:
    """Check that a cotangent is one of the circuits' probabilities.

    Raises:  ShapeError: it is not float[n_circuits, 2**n_qubits].
    """
    if cotangent.shape != (len(angles), circuit.n_states):
        expected = f"[{len(angles)}, {circuit.n_states}]"
        raise ShapeError("cotangent", expected, str(list(cotangent.shape)))


def through_estimator(
    estimator: GradientEstimator, source: Source, circuit: Circuit, angles: Tensor, measured: Tensor
) -> Tensor:
    """Return measured probabilities, from which autograd reaches the angles by the estimator.

    Args:    angles: float[n_circuits, n_angles], radians.
             measured: float[n_circuits, 2**n_qubits], which the source gave for these angles.
    """
    connected: Tensor = _Through.apply(angles, measured, estimator, source, circuit)  # type: ignore[no-untyped-call]
    return connected


class _Through(Function):
    @staticmethod
    def forward(ctx: Any, angles: Tensor, measured: Tensor, *parts: Any) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.parts = parts
        return measured.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (angles,) = ctx.saved_tensors
        estimator, source, circuit = ctx.parts
        return estimator.vjp(source, circuit, angles, cotangent), None, None, None, None
