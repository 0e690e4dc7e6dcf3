"""How a generator's circuits are run: which circuit, on which source, with which estimator of gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.autograd import through_estimator
from qpa.circuits.gradients.estimator import GRADIENTS, GradientEstimator
from qpa.circuits.sources.exact import ExactSimulator
from qpa.circuits.sources.source import Cost, Source, total
from qpa.errors import OptionError
from qpa.seeds import split_seed


@dataclass(frozen=True)
class Execution:
    """A circuit and what runs it; by default it is simulated exactly, with adjoint gradients."""

    circuit: Circuit
    source: Source = field(default_factory=ExactSimulator)
    gradient: GradientEstimator = field(default_factory=Adjoint)

    def __post_init__(self) -> None:
        if self.gradient.needs_differentiable and not self.source.is_differentiable:
            expected = f"a source that is simulated, for {self.gradient.name} gradients"
            raise OptionError("source", expected, self.source.name, "choose another `gradient`")

    @classmethod
    def of(cls, circuit: Circuit, source: Source, gradient: str, seed: int) -> Execution:
        """Return the execution of a circuit on a source and with an estimator of this name.

        Raises:  OptionError: it is unknown, or they do not go together.
        """
        return cls(circuit, source, GRADIENTS[gradient](split_seed(seed, f"gradient {gradient}")))

    def run(self, angles: Tensor) -> Tensor:
        """Run the circuits once, and return probabilities from which autograd reaches the angles.

        Args:    angles: float[n_circuits, n_angles], radians.
        Returns: float[n_circuits, 2**n_qubits].
        """
        if self.gradient.needs_differentiable:
            return self.source.probabilities(self.circuit, angles)  # keeps its states for the way back
        with torch.no_grad():
            measured = self.source.probabilities(self.circuit, angles.detach())
        return self.connect(angles, measured)

    def connect(self, angles: Tensor, measured: Tensor) -> Tensor:
        """Return earlier measurements, from which autograd reaches the angles, without running a device.

        Args:    measured: what `run` gave for these angles; a simulation is run again and gives the same.
        """
        if self.gradient.needs_differentiable:
            return self.source.probabilities(self.circuit, angles)
        return through_estimator(self.gradient, self.source, self.circuit, angles, measured)

    def step_cost(self, n_circuits: int) -> Cost:
        """Return what a step of training costs: the circuits once, and what their gradient takes."""
        forward = self.source.cost(self.circuit, n_circuits)
        if self.gradient.needs_differentiable:
            return forward
        backward = self.source.cost(self.circuit, self.gradient.n_evaluations(self.circuit, n_circuits))
        return total(forward, backward)
