"""Which way to run the circuit on a device: a choice among a finite set, on the device's simulated noise.

Rules:
1. A candidate is a setting of the transpiler, a mitigation and a number of shots. Settings that lead to the
   same circuit, byte for byte, are one.
2. Its error is measured: circuits with random angles are sampled with the device's noise, corrected, and
   compared with their exact probabilities.
3. Every circuit is sampled once, with the most shots of all candidates, and so is what mitigations measure
   besides. Fewer shots are drawn from these counts without replacement: that is distributed as if they had
   been sampled on their own.
4. A candidate is of interest if no other one is at least as good in error, executions and time, and better
   in one of them; of equals the first is. Chosen is the one with the fewest executions whose error is
   within TOLERANCE of the smallest.

Source: QBalance, arXiv 2605.02966, for the choice among non-dominated strategies; how each is measured is
ours.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from qpa.circuits.circuit import Circuit, load_circuit
from qpa.circuits.mitigation.mitigation import NONE, calibrate, corrected, parse_mitigations
from qpa.circuits.sources.noisy import MAX_DENSITY_QUBITS, NoisySimulator
from qpa.circuits.sources.source import SourceSettings
from qpa.circuits.targets import RESET_S, restrict
from qpa.documents import (
    LogicalCircuit,
    NativeCircuit,
    Provenance,
    Selection,
    Strategy,
    TriedCircuit,
    WeightLayout,
)
from qpa.errors import OptionError
from qpa.pipeline.pass_protocol import Pass, PassContext
from qpa.pipeline.pipeline import verify
from qpa.progress import Progress
from qpa.store.run_directory import DirectoryStore

P = TypeVar("P", bound=Pass)

NAME = "select-strategy"
LEVELS = (0, 1, 2, 3)
LAYOUTS = (1, 4)
MITIGATIONS_TRIED = (NONE, "readout", "depolarizing", "readout+depolarizing")
"""Those for which a few circuits are run besides; zne runs every circuit once more, and longer."""
SHOTS = (1024, 8192, 65536)
TOLERANCE = 0.1
"""How much larger than the smallest error that of the chosen candidate may be, as a fraction."""

N_REFERENCES = 2
"""How many circuits with random angles are run; a density matrix of 11 qubits takes 5 s for each."""
N_DRAWS = 2
"""How often counts with fewer shots are drawn; the error is the mean."""

_COUNTS = "counts"
_ERROR_DIGITS = 6


class Costs(NamedTuple):
    """The numbers of a candidate that are to be small, see `Strategy`."""

    error: float
    n_executions: int
    time_s: float


@dataclass(frozen=True)
class _Tried:
    """A circuit as a setting of the transpiler makes it."""

    circuit: Circuit
    native: NativeCircuit
    facts: TriedCircuit


@dataclass(frozen=True)
class _Seeds:
    angles: int
    sampling: int
    thinning: int


def select_strategy(transpile: Pass, context: PassContext) -> Selection:
    """Choose how to run the circuit of a plan on a device.

    Args:    transpile: a TranspileCircuit for the device; its level and its number of layouts do not matter.
             context: has the logical circuit and the layout; the device's file is left in its files.
    Returns: the document, the same bytes for the same seed and device.
    Raises:  OptionError: there is no device, there are no circuits, or too many qubits to simulate.
             TargetError: the target is unknown, too small, or cannot carry the circuit.
    """
    logical = context.document(LogicalCircuit)
    if not context.document(WeightLayout).features.has_circuits:
        raise OptionError("select", "a plan with circuits", "a control in their place", "leave it out")
    _check_size(logical.ansatz.n_qubits)
    seeds = _Seeds(*(context.seed_for(f"{NAME} {use}") for use in ("angles", "sampling", "thinning")))
    tried, device = _transpile_all(transpile, context)
    _check_size(min(one.facts.n_used_qubits for one in tried))
    candidates = _measure_all(tried, logical.n_circuits, seeds, context.progress)
    costs = [Costs(one["error"], one["n_executions"], one["time_s"]) for one in candidates]
    chosen, why = choose(costs)
    native = tried[0].native
    selection = Selection(
        provenance=_provenance(context.provenance(transpile, logical)),
        target=native.target,
        calibrated=native.calibrated,
        device=context.files.put("{sha256}.device", device),
        n_circuits=logical.n_circuits,
        n_reference_circuits=N_REFERENCES,
        angle_seed=seeds.angles,
        sampling_seed=seeds.sampling,
        thinning_seed=seeds.thinning,
        tolerance=TOLERANCE,
        circuits=tuple(one.facts for one in tried),
        candidates=tuple(
            Strategy(**facts, is_non_dominated=best)
            for facts, best in zip(candidates, non_dominated(costs), strict=True)
        ),
        chosen=chosen,
        why=why,
    )
    verify(selection, NAME)
    return selection


def as_chosen(transpile: P, selection: Selection) -> P:
    """Return a TranspileCircuit with the level and the number of layouts that were chosen."""
    chosen = selection.chosen_circuit
    return _with_setting(transpile, chosen.optimization_level, chosen.layouts)


def non_dominated(costs: Sequence[Costs]) -> list[bool]:
    """Return for each candidate whether none is at least as good in every number and better in one.

    Of equals only the first counts: the levels of the transpiler often differ in the order of gates alone.
    """
    first = list(dict.fromkeys(costs))
    best = {one for one in first if not any(_at_least_as_good(other, one) for other in first if other != one)}
    return [one in best and one not in costs[:place] for place, one in enumerate(costs)]


def _at_least_as_good(one: Costs, other: Costs) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def choose(costs: Sequence[Costs]) -> tuple[int, str]:
    """Choose a candidate, one that is not dominated.

    Returns: its place, the first of equals, and in words why it is chosen.
    """
    smallest = min(one.error for one in costs)
    near = [number for number, one in enumerate(costs) if one.error <= (1 + TOLERANCE) * smallest]
    chosen = min(near, key=lambda number: (costs[number].n_executions, *costs[number], number))
    why = (
        f"fewest executions, then smallest error, of the {len(near)} of {len(costs)} candidates with errors "
        f"within {100 * TOLERANCE:g} % of the smallest, {smallest:.4f}"
    )
    return chosen, why


def thinned(counts: Mapping[str, Tensor], shots: int, random: np.random.Generator) -> dict[str, Tensor]:
    """Draw counts with fewer shots, without replacement.

    Args:    counts: int64[n, n_states] by name; every row has at least so many shots.
    Returns: likewise, every row with `shots` shots.
    """
    return {
        name: torch.from_numpy(
            np.stack([random.multivariate_hypergeometric(row, shots) for row in table.numpy()])
        )
        for name, table in counts.items()
    }


def _transpile_all(transpile: Pass, context: PassContext) -> tuple[list[_Tried], bytes]:
    """Return the circuit with every setting of the transpiler, and the device's file."""
    logical, settings = context.document(LogicalCircuit), list(product(LEVELS, LAYOUTS))
    tried: list[_Tried] = []
    with tempfile.TemporaryDirectory() as work:
        apart = replace(context, files=DirectoryStore(Path(work)))
        for number, (level, layouts) in enumerate(settings):
            context.progress("transpiling", number, len(settings))
            native = _with_setting(transpile, level, layouts).run(logical, apart)
            assert isinstance(native, NativeCircuit)
            if native.device is None:
                raise OptionError("target", "a device, for `select`", native.target, "name one")
            device = apart.files.get(native.device).read_bytes()
            tried.append(_tried(native, level, layouts, apart))
    return tried, device


def _with_setting(transpile: P, level: int, layouts: int) -> P:
    return replace(transpile, optimization_level=level, layouts=layouts)


def _tried(native: NativeCircuit, level: int, layouts: int, context: PassContext) -> _Tried:
    circuit = load_circuit(replace(context, documents=(*context.documents, native)), native=True)
    assert circuit.native is not None and circuit.device is not None
    runs, _ = restrict(circuit.native, circuit.device.target)
    facts = TriedCircuit(
        optimization_level=level,
        layouts=layouts,
        transpiler_seed=native.transpiler_seed,
        depth=native.depth,
        n_two_qubit_gates=native.n_two_qubit_gates,
        estimated_success_probability=native.estimated_success_probability,
        duration_s=native.duration_s,
        n_used_qubits=runs.num_qubits,
        sha256=native.qpy.sha256,
    )
    return _Tried(circuit, native, facts)


def _check_size(n_qubits: int) -> None:
    if n_qubits > MAX_DENSITY_QUBITS:
        expected = f"at most {MAX_DENSITY_QUBITS} qubits, whose noise is simulated"
        advice = "leave it out, and choose with `optimization_level` and `layouts`"
        raise OptionError("select", expected, str(n_qubits), advice)


def _measure_all(
    tried: Sequence[_Tried], n_circuits: int, seeds: _Seeds, progress: Progress
) -> list[dict[str, Any]]:
    """Return the fields of all candidates; a circuit on too many qubits to simulate has none."""
    source = NoisySimulator(SourceSettings(seeds.sampling, max(SHOTS)))
    first = {one.facts.sha256: number for number, one in reversed(list(enumerate(tried)))}
    numbers = [n for n in sorted(first.values()) if tried[n].facts.n_used_qubits <= MAX_DENSITY_QUBITS]
    found: list[dict[str, Any]] = []
    for n_done, number in enumerate(numbers):
        progress("measuring the candidates", n_done, len(numbers))
        for facts in _measure(tried[number], n_circuits, source, seeds):
            found.append({"circuit": number, **facts})
    return found


def _measure(
    tried: _Tried, n_circuits: int, source: NoisySimulator, seeds: _Seeds
) -> Iterator[dict[str, Any]]:
    """Yield the fields of a circuit's candidates."""
    circuit = tried.circuit
    angles = _reference_angles(circuit, seeds.angles)
    exact = circuit.exact_probabilities(angles)
    tools = {name: parse_mitigations(name) for name in MITIGATIONS_TRIED}
    every = {tool.name: tool for used in tools.values() for tool in used}
    counts = {_COUNTS: source.counts(circuit, angles)}
    counts |= calibrate(list(every.values()), source, circuit, angles)
    random = np.random.default_rng(seeds.thinning)
    run_s = (tried.native.duration_s or 0.0) + RESET_S
    for shots in SHOTS:
        n_draws = 1 if shots == source.shots else N_DRAWS
        draws = [thinned(counts, shots, random) for _ in range(n_draws)]
        for name, used in tools.items():
            distances = [
                0.5 * (corrected(used, draw[_COUNTS], circuit, draw) - exact).abs().sum(1).mean()
                for draw in draws
            ]
            n_runs = n_circuits + sum(sum(tool.calls(circuit, n_circuits)) for tool in used)
            yield {
                "mitigation": name,
                "shots": shots,
                "error": round(min(1.0, float(sum(distances)) / len(distances)), _ERROR_DIGITS),
                "n_executions": n_runs * shots,
                "time_s": n_runs * shots * run_s,
            }


def _reference_angles(circuit: Circuit, seed: int) -> Tensor:
    """Return float64[N_REFERENCES, n_angles], radians, uniform within -pi and pi."""
    random = torch.Generator().manual_seed(seed)
    turns = torch.rand(N_REFERENCES, circuit.n_angles, generator=random, dtype=torch.float64)
    return (2 * turns - 1) * math.pi


def _provenance(transpiled: Provenance) -> Provenance:
    """Return the provenance of a selection from that of a circuit: it has no level and no layouts itself."""
    tried = ("optimization_level", "layouts")
    options = tuple(option for option in transpiled.options if option.name not in tried)
    return transpiled.model_copy(update={"pass_name": NAME, "options": options})
