"""measure-circuit: run the trained circuits once more, for the numbers that will be decoded.

Rules:
1. The circuit is that of the documents, with the trained angles; all circuits travel in one call.
2. The source is the one that trained, unless another is asked for; one that runs the target's own gates gets
   the native circuit as transpile-circuit left it.
3. The distance to the exact probabilities is computed and kept.
4. A control without circuits has nothing to measure; its document says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.circuits.circuit import NO_DEVICE, Circuit, load_circuit
from qpa.circuits.sources.source import SOURCES
from qpa.documents import (
    Document,
    LogicalCircuit,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import DocumentError
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from torch import Tensor

ANGLES = "chunk_features.angles"

_NOTHING: dict[str, Any] = {
    "target": NO_DEVICE,
    "shots": None,
    "n_executions": 0,
    "probabilities": None,
    "distance": 0.0,
}
"""What a measurement says where a control has no circuits."""


@final
@dataclass(frozen=True, slots=True)
class MeasureCircuit:
    """Run the trained circuits on a source.

    Args:    measure_source: a name in `qpa.circuits.sources.source.SOURCES`; None means the one that trained.
    Source:  ours.
    """

    name: ClassVar[str] = "measure-circuit"
    consumes: ClassVar[type] = TrainedGenerator
    requires: ClassVar[tuple[type[Document], ...]] = (WeightLayout, LogicalCircuit)
    produces: ClassVar[type[Document]] = Measurement
    section: ClassVar[str] = "train"

    measure_source: str | None = option(
        None,
        help="What runs the trained circuits once more: {choices}.",
        choices=SOURCES,
        shown_default="what ran them in training",
    )

    def run(self, source: TrainedGenerator, context: PassContext) -> Measurement:
        """Return the measurement; leave its probabilities in the context's files.

        Raises:  OptionError: there is no such source.
                 DocumentError: a file is missing or damaged, or the angles are not the circuit's.
        """
        check_options(self)
        name = self.measure_source or source.source
        has_circuits = context.document(WeightLayout).features.has_circuits
        facts = self._measure(source, name, context) if has_circuits else _NOTHING
        return Measurement(
            provenance=context.provenance(self, source), source=name, mitigation="none", **facts
        )

    def _measure(self, trained: TrainedGenerator, name: str, context: PassContext) -> dict[str, Any]:
        """Return what a measurement says of a run of the circuits."""
        runs_on = SOURCES[name](context.seed_for(self.name))
        circuit = load_circuit(context, native=runs_on.runs_native)
        angles = _angles(trained, circuit, context)
        cost = runs_on.cost(circuit, len(angles))
        context.progress("measuring the circuits", 0, 1)
        measured = runs_on.probabilities(circuit, angles)
        exact = circuit.exact_probabilities(angles)
        return {
            "target": circuit.target,
            "shots": runs_on.shots,
            "n_executions": cost.n_executions,
            "probabilities": context.put_tensors({"probabilities": measured.contiguous()}),
            "distance": min(1.0, float(0.5 * (measured - exact).abs().sum(1).max())),
        }


def _angles(trained: TrainedGenerator, circuit: Circuit, context: PassContext) -> Tensor:
    """Return float32[n_circuits, n_angles], radians."""
    from safetensors.torch import load_file

    path = context.files.get(trained.arrays)
    arrays = load_file(path)
    if ANGLES not in arrays or arrays[ANGLES].shape[1:] != (circuit.n_angles,):
        found = str(list(arrays[ANGLES].shape)) if ANGLES in arrays else "none"
        raise DocumentError(str(path), f"{ANGLES} [n_circuits, {circuit.n_angles}]", found, "train again")
    angles: Tensor = arrays[ANGLES]
    return angles
