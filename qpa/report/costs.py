"""What a training costs where its circuits are sampled, said before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qpa.circuits.sources.source import SOURCES
from qpa.documents import WeightLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.report.circuits import cost_text

if TYPE_CHECKING:
    from qpa.passes.measure_circuit import MeasureCircuit
    from qpa.training.training_options import TrainingOptions


def cost_lines(options: TrainingOptions, measure: MeasureCircuit, context: PassContext) -> Iterator[str]:
    """Yield what a step of a training on sampled circuits costs, and what the measurement after it does."""
    from qpa.training.circuits import cost_of_step, execution_of

    if not SOURCES[options.source].is_differentiable:
        cost = cost_of_step(execution_of(options, context), context.document(WeightLayout))
        yield f"each step: {cost_text(cost)}"
    measuring = measure.cost(options, context)
    if measuring is not None:
        yield f"measuring the trained circuits: {cost_text(measuring)}"
