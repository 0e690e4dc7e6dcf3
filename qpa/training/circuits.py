"""The circuits of a training: what runs them, how their gradient is estimated, and what a step costs."""

from __future__ import annotations

from qpa.circuits.circuit import files_as_run, load_circuit
from qpa.circuits.circuit_options import refuse_without_circuits
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.surrogate import Surrogate
from qpa.circuits.sources.source import SOURCES, Cost
from qpa.documents import Attachment, NativeCircuit, WeightLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.seeds import split_seed
from qpa.training.training_options import TrainingOptions


def gradient_name(options: TrainingOptions) -> str:
    """Return the name of the estimator of gradients."""
    simulated = SOURCES[options.source].is_differentiable
    return options.gradient or (Adjoint.name if simulated else Surrogate.name)


def execution_of(options: TrainingOptions, context: PassContext) -> Execution:
    """Return the circuit of a plan with the source that runs it and the estimator of its gradients.

    Raises:  OptionError: source and estimator do not go together, the source cannot use the options, or they
             are given where no circuit of the plan is measured.
             DocumentError, PipelineError: the circuit cannot be read.
    """
    refuse_without_circuits(options, context.document(WeightLayout))
    seed = context.seed_for("circuits")
    source = options.make_source(options.source, split_seed(seed, f"source {options.source}"))
    circuit = load_circuit(context, native=source.runs_native)
    return Execution.of(circuit, source, gradient_name(options), seed)


def files_of_circuit(options: TrainingOptions, context: PassContext) -> dict[str, Attachment | None]:
    """Return the files of the circuit and the device that a training ran; None for the logical circuit."""
    if not SOURCES[options.source].runs_native:
        return {"circuit": None, "device": None}
    return files_as_run(context.document(NativeCircuit), context)


def cost_of_step(execution: Execution, layout: WeightLayout) -> Cost:
    """Return what a step costs on the source: nothing where a control has no circuits."""
    if not layout.features.has_circuits:
        return Cost(0, 0, 0)
    if layout.features.n_angles(layout.ansatz):
        return execution.step_cost(layout.n_circuits)
    return execution.source.cost(execution.circuit, layout.n_circuits)
