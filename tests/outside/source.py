"""A source from outside: Qiskit's sampler runs the circuit in the target's own gates."""

from __future__ import annotations

import torch
from qiskit.primitives import StatevectorSampler

from qpa.circuits.sources.source import Cost


class QiskitSampler:
    """Sample every set of angles with 512 shots; all of them are one job."""

    name = "qiskit-sampler"
    is_differentiable = False
    runs_native = True
    needs_backend = False
    is_paid = False
    shots = 512

    def __init__(self, settings):
        self.sampler = StatevectorSampler(seed=settings.seed % 2**32)

    def probabilities(self, circuit, angles):
        job = self.sampler.run([(circuit.native, angles.double().numpy())], shots=self.shots)
        (register,) = job.result()[0].data.values()
        rows = [register.get_int_counts(row) for row in range(len(angles))]
        found = torch.zeros(len(angles), circuit.n_states)
        for row, counts in enumerate(rows):
            for state, count in counts.items():
                found[row, state] = count / self.shots
        return circuit.histogram(found)

    def cost(self, circuit, n_evaluations):
        return Cost(n_evaluations, n_evaluations * self.shots, 1)
