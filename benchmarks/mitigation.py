"""How near each mitigation brings a histogram to the exact distribution, with equally many shots in all.

    python -m benchmarks.mitigation [--quick]

A row has a total of shots for every circuit, which includes the shots of calibration. A source runs all its
circuits with the same number, so n circuits with m runs besides get n / (n + m) of the total each. With one
circuit a calibration is dear; with 24 that share one it costs little. A column is a mitigation, and a cell
the total variation distance to the exact distribution: the mean over seeds of angles, and over DRAWS of shots
for each, with the standard deviation between the seeds. The least of a row is bold.

The circuits are ry-cnot-chain, with normal angles around those of the uniform start, and the devices those of
`noisy`, whose readout errs as often on 0 as on 1. That of real ones does not, so "uneven" adds to fake_fez
what the median qubit of its calibration has: 1 is read as 0 in a further 0.8 % of shots.

Every circuit is run once by `noisy`, and the shots of a run are drawn from these without replacement.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.paired import markdown
from benchmarks.sampled_circuits import circuit_on
from qpa.circuits.circuit import Circuit
from qpa.circuits.mitigation.depolarizing import REFERENCE, Depolarizing
from qpa.circuits.mitigation.mitigation import (
    Mitigation,
    calibrate,
    corrected,
    frequencies,
    parse_mitigations,
)
from qpa.circuits.mitigation.readout import ONES, ZEROS, Readout
from qpa.circuits.mitigation.zero_noise import ZeroNoise
from qpa.circuits.sources.noisy import NoisySimulator
from qpa.circuits.sources.sampled import Change, SampledSource
from qpa.circuits.sources.source import SourceSettings
from qpa.generators.features.states import state_bits

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

TOTALS = ((65_536, 1), (65_536, 24), (8_192, 1))
"""Shots for every circuit, calibration included, and the number of circuits that share a calibration."""
MOST_SHOTS = 65_536
DRAWS = 3
UNEVEN = 0.008
MAX_CENTRES = 64


class Case(NamedTuple):
    """A circuit on a device.

    Args:    sd: standard deviation of the angles, radians.
             uneven: the probability that a 1 is read as 0, besides the errors of the device.
    """

    n_qubits: int
    n_layers: int
    target: str
    sd: float
    uneven: float = 0.0

    def row(self) -> tuple[str, ...]:
        """Return how a table names it."""
        device = f"{self.target}, uneven" if self.uneven else self.target
        return f"{self.n_qubits} x {self.n_layers}", device, f"{self.sd}"


class Pool:
    """All shots that were ever taken of a circuit, by what was run."""

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self._counts: dict[tuple[object, ...], Any] = {}
        self.source = NoisySimulator(SourceSettings(0, MOST_SHOTS))

    def counts(self, row: Tensor, change: Change | None) -> Any:
        """Return int64[2**n_qubits], which sum to MOST_SHOTS."""
        _, runs = self.source.sampler(self.circuit, 0)
        gates = (change(runs) if change else runs).count_ops()
        key = (row.numpy().tobytes(), *sorted(gates.items()))
        if key not in self._counts:
            self.source.settings = SourceSettings(len(self._counts), MOST_SHOTS)
            self._counts[key] = self.source.counts(self.circuit, row[None], change)[0].numpy()
        return self._counts[key]


class Drawn(SampledSource):
    """A source that takes its shots from a pool, and reads some ones as zeros."""

    name: ClassVar[str] = "drawn"
    runs_native: ClassVar[bool] = True

    def __init__(self, pool: Pool, shots: int, uneven: float, random: np.random.Generator) -> None:
        super().__init__(SourceSettings(0, shots))
        self._pool, self._uneven, self._random = pool, uneven, random

    def sampler(self, circuit: Circuit, seed: int) -> tuple[Any, QuantumCircuit]:
        """Return what fills the pool."""
        return self._pool.source.sampler(circuit, seed)

    def counts(self, circuit: Circuit, angles: Tensor, change: Change | None = None) -> Tensor:
        """Draw the shots."""
        rows = [self._draw(self._pool.counts(row, change)) for row in angles]
        return torch.from_numpy(np.stack(rows))

    def _draw(self, counts: Any) -> Any:
        drawn = self._random.multivariate_hypergeometric(counts, self.shots, method="marginals")
        for qubit in range(len(counts).bit_length() - 1):
            axes = drawn.reshape(2**qubit, 2, -1)
            moved = self._random.binomial(axes[:, 1], self._uneven)
            axes[:, 0] += moved
            axes[:, 1] -= moved
        return drawn


class Method(NamedTuple):
    """A way to get a distribution.

    Args:    n_evaluations: how many circuits it runs besides n.
             estimate: runs one circuit, and returns float[1, 2**n_qubits].
    """

    n_evaluations: Callable[[Circuit, int], int]
    estimate: Callable[[Drawn, Circuit, Tensor], Tensor]


def mitigated(mitigations: Sequence[Mitigation]) -> Method:
    """Return the method of mitigations, one after another."""

    def n_evaluations(circuit: Circuit, n_circuits: int) -> int:
        return sum(sum(one.calls(circuit, n_circuits)) for one in mitigations)

    def estimate(source: Drawn, circuit: Circuit, angles: Tensor) -> Tensor:
        counts = source.counts(circuit, angles)
        return corrected(mitigations, counts, circuit, calibrate(mitigations, source, circuit, angles))

    return Method(n_evaluations, estimate)


def mthree(source: Drawn, circuit: Circuit, angles: Tensor) -> Tensor:
    """Correct by the package mthree, with the calibration of readout."""
    calibration = Readout().calibrate(source, circuit, angles)
    bits = state_bits(circuit.n_states, circuit.ansatz.n_qubits).double()
    zeros, ones = (frequencies(calibration[name])[0] @ bits for name in (ZEROS, ONES))  # how often 1 is read
    matrices = [np.array([[1 - up, 1 - one], [up, one]]) for up, one in zip(zeros, ones, strict=True)]
    (counts,) = source.counts(circuit, angles)
    width = circuit.ansatz.n_qubits
    named = {f"{state:0{width}b}": int(count) for state, count in enumerate(counts) if count}
    corrector = import_module("mthree").M3Mitigation(None)
    corrector.single_qubit_cals = matrices[::-1]  # the last character is qubit 0
    found = corrector.apply_correction(named, range(width)).nearest_probability_distribution()
    probabilities = torch.zeros(1, circuit.n_states)
    for state, probability in found.items():
        probabilities[0, int(state, 2)] = float(probability)
    return circuit.histogram(probabilities)


def q_cluster(source: Drawn, circuit: Circuit, angles: Tensor) -> Tensor:
    """Move the shots to the centres of clusters, after arXiv 2504.10801.

    Centres are majority votes of the bit strings that are nearest to them. As long as more than 5 % of the
    shots are farther from all centres than flips lead, the commonest of these becomes one, MAX_CENTRES times
    at most. Then a shot is divided among the centres by the probability that flips lead from there to it. The
    paper learns the probability of a flip from many circuits; here it is that of depolarizing's reference.
    """
    bits = state_bits(circuit.n_states, circuit.ansatz.n_qubits).double()
    (reference,) = frequencies(Depolarizing().calibrate(source, circuit, angles)[REFERENCE])
    flip = float((reference @ (bits - bits[reference.argmax()]).abs()).mean())
    (seen,) = frequencies(source.counts(circuit, angles))
    n_bits = bits.shape[1]
    reach = n_bits * flip + 2 * math.sqrt(n_bits * flip * (1 - flip))
    centres = bits[seen.argmax()][None]
    for _ in range(MAX_CENTRES):
        nearest = torch.nn.functional.one_hot(torch.cdist(bits, centres, p=1).argmin(1), len(centres))
        weights = nearest * seen[:, None]
        centres = (weights.T @ bits > 0.5 * weights.sum(0)[:, None]).double().unique(dim=0)
        outside = seen * (torch.cdist(bits, centres, p=1).min(1).values > reach)
        if outside.sum() < 0.05:
            break
        centres = torch.cat((centres, bits[outside.argmax()][None]))
    distances = torch.cdist(bits, centres, p=1)
    likelihood = flip**distances * (1 - flip) ** (n_bits - distances)
    shares = seen.new_full((len(centres),), 1 / len(centres))
    for _ in range(20):
        posterior = likelihood * shares
        shares = seen @ (posterior / posterior.sum(1, keepdim=True))
    return circuit.histogram(((distances == 0).double() @ shares)[None])


def methods() -> dict[str, Method]:
    """Return all ways by their names."""
    names = ("none", "readout", "depolarizing", "readout+depolarizing", "zne", "readout+zne")
    found = {name: mitigated(parse_mitigations(name)) for name in names}
    # It undoes errors of gates twice, and `parse_mitigations` refuses it.
    found["readout+depolarizing+zne"] = mitigated([Readout(), Depolarizing(), ZeroNoise()])
    found["q-cluster"] = Method(lambda circuit, n_circuits: 1, q_cluster)
    if find_spec("mthree"):
        found["mthree"] = Method(mitigated([Readout()]).n_evaluations, mthree)
    else:
        print("mthree is not installed, and is left out\n")
    return found


def angles_of(circuit: Circuit, sd: float, seed: int) -> Tensor:
    """Return float64[1, n_angles] around the uniform start: 0, and pi / 2 in the last layer."""
    random = torch.Generator().manual_seed(seed)
    angles = sd * torch.randn(1, circuit.n_angles, generator=random, dtype=torch.float64)
    angles[:, -circuit.ansatz.n_qubits :] += math.pi / 2
    return angles


def distances(case: Case, pool: Pool, method: Method, total: int, n_circuits: int, seeds: int) -> list[float]:
    """Return the total variation distance for each seed of the angles, the mean of DRAWS."""
    circuit = pool.circuit
    shots = total * n_circuits // (n_circuits + method.n_evaluations(circuit, n_circuits))
    found = []
    for seed in range(seeds):
        angles = angles_of(circuit, case.sd, seed)
        exact = circuit.exact_probabilities(angles)
        source = Drawn(pool, shots, case.uneven, np.random.default_rng(seed))
        estimates = torch.cat([method.estimate(source, circuit, angles) for _ in range(DRAWS)])
        found.append(float(0.5 * (estimates - exact).abs().sum(1).mean()))
    return found


def cases(*, quick: bool) -> list[Case]:
    """Return the rows of the table."""
    if quick:
        return [Case(3, 2, "generic:3", 1.0)]
    sds = (0.3, 1.0)
    devices = product(("fake_torino", "fake_fez", "generic:12", "ions:11"), sds)
    return [
        *(Case(7, 8, target, sd) for target, sd in devices),
        *(Case(7, 8, "fake_fez", sd, UNEVEN) for sd in sds),
        *(Case(11, 5, target, 1.0) for target in ("fake_torino", "ions:11")),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare mitigations at equal numbers of shots.")
    parser.add_argument("--quick", action="store_true", help="One small circuit with one seed.")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = 1 if options.quick else options.seeds
    ways, rows = methods(), []
    pools: dict[tuple[int, str], Pool] = {}
    for case in cases(quick=options.quick):
        key = case.n_qubits, case.target
        if key not in pools:
            pools[key] = Pool(circuit_on(case.target, case.n_qubits, case.n_layers))
        for total, n_circuits in TOTALS:
            cells = [distances(case, pools[key], way, total, n_circuits, seeds) for way in ways.values()]
            rows.append((*case.row(), f"{total:,}", str(n_circuits), *_texts(cells)))
    header = ("qubits x layers", "device", "sd", "shots a circuit", "circuits", *ways)
    print(markdown(header, rows))


def _texts(cells: list[list[float]]) -> list[str]:
    means = [statistics.mean(cell) for cell in cells]
    texts = [f"{mean:.3f} ± {statistics.pstdev(cell):.3f}" for mean, cell in zip(means, cells, strict=True)]
    return [f"**{text}**" if mean == min(means) else text for mean, text in zip(means, texts, strict=True)]


if __name__ == "__main__":
    main()
