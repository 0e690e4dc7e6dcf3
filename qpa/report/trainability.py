"""How far the angles of a run's circuits move what decoders see, as rows for tables and as JSON.

Compared are the start, which is the angles that the run's generator begins with, and random angles. The
quantities and their estimates are those of `qpa.circuits.trainability`:

* Gradients are of one feature in the scale of sqrt(p 2^N), which is the generator's up to a factor and a
  constant, and of the probability p, averaged over all basis states: by layer for the run's circuit, and over
  all angles for circuits of 4 to 14 qubits and otherwise the run's. With features that are differences of two
  roots, one root is taken. The column "x 4^N" is p's, at random angles, in the scale of p 2^N, so that scale
  and root can be told apart.
* Directions and spread are of the run's own features, at the basis states that chunks read; where these are
  many, at MAX_STATES of them.

Everything is simulated exactly, and drawn from the plan's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qpa.documents import WeightLayout
from qpa.report.rows import Rows, number
from qpa.seeds import split_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qpa.circuits.circuit import Circuit
    from qpa.circuits.trainability import Expressivity, Gradients

QUBITS = range(4, 15)
"""Of the circuits whose gradients are compared with those of the run's own."""

MAX_CIRCUITS = 4
"""The most circuits of a run whose directions are computed."""

MAX_STATES = 2**14
"""The most basis states at which directions and spread are computed."""

LAYERS_HEADER = ("layer", "angles", "feature, start", "feature, random", "p, start", "p, random")
QUBITS_HEADER = ("qubits", *LAYERS_HEADER[1:], "x 4^N")
EXPRESSIVITY_HEADER = ("features of one circuit", "start", "random")

START, RANDOM = "start", "random"


@dataclass(frozen=True)
class Trainability:
    """What was found for the circuits of a run; the keys "start" and "random" are where their angles are.

    Args:    feature: the feature whose gradients are given, as a formula.
             n_angles, n_states: the angles of one circuit, and the basis states that chunks read.
             layers: gradients of the run's circuit.
             by_qubits: gradients of circuits of these qubits.
             expressivity: of the run's circuits.
    """

    feature: str
    n_qubits: int
    n_angles: int
    n_states: int
    layers: Mapping[str, Gradients]
    by_qubits: Mapping[int, Mapping[str, Gradients]]
    expressivity: Mapping[str, Expressivity]


def trainability_of(layout: WeightLayout) -> Trainability | None:
    """Return how trainable a layout's circuits are, the same in every process; None where it has none.

    It takes a few seconds, and longer for more than 14 qubits.

    Raises:  OptionError: this qpa has no such features.
             DocumentError: this qpa has no such ansatz.
    """
    if not layout.features.has_circuits:
        return None
    n_own = layout.ansatz.n_qubits
    with _one_thread():
        layers = _gradients(layout)
        return Trainability(
            feature=f"sqrt(p 2^N + {_epsilon(layout):g})",
            n_qubits=n_own,
            n_angles=layout.ansatz.n_angles,
            n_states=len(layout.states),
            layers=layers,
            by_qubits={
                n_qubits: layers if n_qubits == n_own else _gradients(_of_qubits(layout, n_qubits))
                for n_qubits in sorted({*QUBITS, n_own})
            },
            expressivity=_expressivity(layout),
        )


def layers_title(found: Trainability) -> str:
    """Return what the table of layers shows."""
    error = _error(found.layers[START])
    return f"mean square gradients of {found.feature} and of p by layer; standard error {error:.0%}"


def layers_rows(found: Trainability) -> Rows:
    """Return gradients by layer, under the words of `LAYERS_HEADER`."""
    start, random = found.layers[START], found.layers[RANDOM]
    by_layer = zip(
        start.layer_sizes, start.feature, random.feature, start.probability, random.probability, strict=True
    )
    return [
        (str(layer), number(n_angles), f"{a:.3f}", f"{b:.3f}", f"{c:.1e}", f"{d:.1e}")
        for layer, (n_angles, a, b, c, d) in enumerate(by_layer, 1)
    ]


def qubits_title(found: Trainability) -> str:
    """Return what the table of qubits shows."""
    return "the same over all layers by qubits, the run's (*) and others"


def qubits_rows(found: Trainability) -> Rows:
    """Return gradients by qubits, under the words of `QUBITS_HEADER`."""
    return [
        (
            f"{'*' if n_qubits == found.n_qubits else ' '} {n_qubits}",
            number(sum(at[START].layer_sizes)),
            f"{at[START].mean_feature:.3f}",
            f"{at[RANDOM].mean_feature:.3f}",
            f"{at[START].mean_probability:.1e}",
            f"{at[RANDOM].mean_probability:.1e}",
            f"{4**n_qubits * at[RANDOM].mean_probability:.2f}",
        )
        for n_qubits, at in found.by_qubits.items()
    ]


def expressivity_title(found: Trainability) -> str:
    """Return what the table of directions shows."""
    return f"directions in which {number(found.n_angles)} angles move {number(found.n_states)} features"


def expressivity_rows(found: Trainability) -> Rows:
    """Return the directions and the spread of features, under the words of `EXPRESSIVITY_HEADER`."""
    start, random = found.expressivity[START], found.expressivity[RANDOM]
    return [
        ("independent directions", f"{start.rank:g}", f"{random.rank:g}"),
        ("effective rank", f"{start.effective_rank:.1f}", f"{random.effective_rank:.1f}"),
        ("with 99 % of the movement", f"{start.n_for_99_percent:g}", f"{random.n_for_99_percent:g}"),
        ("spread over basis states", f"{start.spread:.3f}", f"{random.spread:.3f}"),
    ]


def trainability_json(found: Trainability) -> dict[str, Any]:
    """Return the same by name."""
    return {
        "feature": found.feature,
        "n_qubits": found.n_qubits,
        "n_angles": found.n_angles,
        "n_states": found.n_states,
        "layers": {name: asdict(gradients) for name, gradients in found.layers.items()},
        "expressivity": {name: asdict(expressivity) for name, expressivity in found.expressivity.items()},
        "qubits": [
            {
                "n_qubits": n_qubits,
                "n_angles": sum(at[START].layer_sizes),
                **{name: _means(gradients) for name, gradients in at.items()},
            }
            for n_qubits, at in found.by_qubits.items()
        ],
    }


def _means(gradients: Gradients) -> dict[str, Any]:
    return {
        "feature": gradients.mean_feature,
        "probability": gradients.mean_probability,
        "n_draws": gradients.n_draws,
    }


def _error(gradients: Gradients) -> float:
    """Return the relative standard error of the layer with the fewest angles."""
    return math.sqrt(2 / (gradients.n_draws * min(gradients.layer_sizes)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread, with which small circuits are faster and sums have one order."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _epsilon(layout: WeightLayout) -> float:
    """Return what is added below the root in the scale of p 2^N; a window's feature has it in its own."""
    from qpa.serve.features import FEATURE_EPSILON

    windows = layout.features.windows
    return FEATURE_EPSILON * (1 if windows is None else 2**windows.n_window_qubits)


def _of_qubits(layout: WeightLayout, n_qubits: int) -> WeightLayout:
    """Return a layout with circuits of other qubits, for their start alone; its groups do not fit them."""
    from qpa.circuits.ansatz import make_ansatz
    from qpa.circuits.trainability import n_draws_for

    features, windows = layout.features, layout.features.windows
    if windows is not None:
        n_window_qubits = min(windows.n_window_qubits, n_qubits)
        windows = windows.model_copy(update={"n_window_qubits": n_window_qubits})
    circuits = {"windows": windows, "n_circuits": n_draws_for(n_qubits)}
    ansatz = make_ansatz(layout.ansatz.kind, n_qubits, layout.ansatz.n_layers)
    return layout.model_copy(update={"ansatz": ansatz, "features": features.model_copy(update=circuits)})


def _gradients(layout: WeightLayout) -> dict[str, Gradients]:
    """Return the gradients of a layout's circuits at their start and at random angles."""
    import torch

    from qpa.circuits.circuit import Circuit
    from qpa.circuits.trainability import gradients_at, n_draws_for, uniform_angles

    circuit, epsilon = Circuit(layout.ansatz), _epsilon(layout)
    random, n_draws = _random(layout, "gradients"), n_draws_for(layout.ansatz.n_qubits)
    start = _start(layout, circuit).angles.detach()
    drawn = start[torch.randint(len(start), (n_draws,), generator=random)]

    def feature(probabilities: Tensor) -> Tensor:
        return torch.sqrt(probabilities * circuit.n_states + epsilon)

    places = {START: drawn, RANDOM: uniform_angles(layout.ansatz, n_draws, random)}
    return {name: gradients_at(circuit, angles, feature, random) for name, angles in places.items()}


def _expressivity(layout: WeightLayout) -> dict[str, Expressivity]:
    """Return the directions of some of a layout's circuits at their start and at random angles."""
    import torch

    from qpa.circuits.circuit import Circuit
    from qpa.circuits.trainability import expressivity_at, uniform_angles

    circuit, random = Circuit(layout.ansatz), _random(layout, "expressivity")
    module, states = _start(layout, circuit), torch.tensor(layout.states)
    states = states[torch.randperm(len(states), generator=random)[:MAX_STATES]]
    angles: Tensor = module.angles.detach()
    start = angles[torch.randperm(len(angles), generator=random)[:MAX_CIRCUITS]]

    def features(probabilities: Tensor) -> Tensor:
        of_all: Tensor = module(probabilities)
        return of_all[states].T

    places = {START: start, RANDOM: uniform_angles(layout.ansatz, len(start), random)}
    return {name: expressivity_at(circuit, some, features) for name, some in places.items()}


def _start(layout: WeightLayout, circuit: Circuit) -> Any:
    """Return the module of a layout's features as its generator begins with it."""
    from qpa.circuits.execution import Execution
    from qpa.generators.features.kind import FEATURES

    return FEATURES[layout.features.kind].build(layout, layout.seed, Execution(circuit))


def _random(layout: WeightLayout, name: str) -> torch.Generator:
    """Return a random generator for one use in one number of qubits."""
    import torch

    return torch.Generator().manual_seed(split_seed(layout.seed, f"{name} {layout.ansatz.n_qubits}"))
