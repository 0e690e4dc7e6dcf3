"""The passes, and the order in which they run.

basis      inspect-model -> calibrate-basis
plan       inspect-model -> plan-layout -> synthesize-circuit -> transpile-circuit
transpile  transpile-circuit, again for another device, before or after training
train      train-generator -> measure-circuit -> freeze-adapter
freeze     measure-circuit -> freeze-adapter, again, on another source
explain    explain-generator, on a trained run
verify     verify-adapter, on an exported directory
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpa.documents import (
    AdapterSpec,
    FrozenAdapter,
    LogicalCircuit,
    Manifest,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.synthesize_circuit import SynthesizeCircuit
from qpa.pipeline.pipeline import Pipeline
from qpa.training.data.data_options import names_of

if TYPE_CHECKING:
    from qpa.passes.calibrate_basis import CalibrateBasis
    from qpa.passes.explain_generator import ExplainGenerator
    from qpa.passes.inspect_model import InspectModel
    from qpa.passes.plan_layout import PlanLayout
    from qpa.passes.train_generator import TrainGenerator
    from qpa.passes.transpile_circuit import TranspileCircuit
    from qpa.passes.verify_adapter import VerifyAdapter

PLANNED = (AdapterSpec, WeightLayout, LogicalCircuit)
"""What training reads of a plan: the circuit in a device's own gates is no part of it."""


def basis_pipeline(inspect: InspectModel, calibrate: CalibrateBasis) -> Pipeline:
    """Return the passes of `qpa basis`: from a model's name to the directions of its gradient."""
    return Pipeline(inspect, calibrate)


def planning_pipeline(inspect: InspectModel, layout: PlanLayout, transpile: TranspileCircuit) -> Pipeline:
    """Return the passes of `qpa plan`: from a model's name to a native circuit."""
    return Pipeline(inspect, layout, SynthesizeCircuit(), transpile)


def transpilation_pipeline(transpile: TranspileCircuit) -> Pipeline:
    """Return the pass of `qpa transpile`: from a run's logical circuit to a native one."""
    return Pipeline(transpile, given=PLANNED)


def training_pipeline(
    train: TrainGenerator, measure: MeasureCircuit | None = None, freeze: FreezeAdapter | None = None
) -> Pipeline:
    """Return the passes of `qpa train`: from a plan to a frozen adapter."""
    measure = measure or MeasureCircuit()
    freeze = freeze or FreezeAdapter(
        data=names_of(train.data),
        eval_data=train.eval_data,
        data_revision=train.data_revision,
        chat_template=train.chat_template,
        trust_remote_code=train.trust_remote_code,
    )
    return Pipeline(train, measure, freeze, given=PLANNED)


def freezing_pipeline(measure: MeasureCircuit, freeze: FreezeAdapter) -> Pipeline:
    """Return the passes of `qpa freeze`: from a trained generator to a frozen adapter."""
    return Pipeline(measure, freeze, given=(*PLANNED, TrainedGenerator))


def explaining_pipeline(explain: ExplainGenerator) -> Pipeline:
    """Return the pass of `qpa explain`: from a frozen adapter to what its generator's parts contribute."""
    return Pipeline(explain, given=(*PLANNED, TrainedGenerator, Measurement, FrozenAdapter))


def verification_pipeline(verify: VerifyAdapter) -> Pipeline:
    """Return the passes of `qpa verify`: from an export's manifest to what independent readers made of it."""
    return Pipeline(verify, given=(Manifest,))
