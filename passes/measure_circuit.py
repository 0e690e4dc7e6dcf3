"""measure-circuit: run the trained circuits once more, for the numbers that will be decoded.

Rules:
1. The circuit is that of the documents, with the trained angles; all circuits travel in one call.
2. The source is the one that trained, with its shots and backend, unless another is asked for; one that runs
   the target's own gates gets the native circuit as transpile-circuit left it.
3. Where circuits are sampled, the counts are kept as they were measured, with those that a mitigation
measures
   besides: the probabilities follow from them. Of a native circuit copies of its files are kept, since the
   run may be transpiled for another device afterwards.
4. The distance to the exact probabilities is computed and kept.
5. A control without circuits has nothing to measure; its document says so, and options for it are refused.
6. Where contexts program the angles, the circuits run at those of one context: the one that is asked for, by
   name or by a prompt, or else the first. The numbers that tell it are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.circuits.circuit import NO_DEVICE, Circuit, files_as_run, load_circuit
from qpa.circuits.circuit_options import refuse_without_circuits
from qpa.circuits.mitigation.mitigation import NONE, calibrate, corrected, parse_mitigations
from qpa.circuits.sources.sampling_options import SamplingOptions
from qpa.circuits.sources.source import SOURCES, Cost, Source, total
from qpa.documents import (
    AdapterSpec,
    Document,
    LogicalCircuit,
    MeasuredContext,
    Measurement,
    NativeCircuit,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import OptionError, one_of, unknown_name
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from torch import Tensor

    from qpa.training.training_options import TrainingOptions

    Trained = TrainedGenerator | TrainingOptions
    """What tells the source of a training."""

COUNTS = "counts"

_NO_CIRCUIT: dict[str, Any] = {
    "calibrated": None,
    "physical_qubits": (),
    "lacks_last_layer": False,
    "circuit": None,
    "device": None,
}
"""What a measurement says where the logical circuit was run."""

_NOTHING: dict[str, Any] = {
    "target": NO_DEVICE,
    "shots": None,
    "n_executions": 0,
    "counts": None,
    "probabilities": None,
    "distance": 0.0,
    **_NO_CIRCUIT,
}
"""What a measurement says where a control has no circuits."""


@final
@dataclass(frozen=True, slots=True)
class MeasureCircuit(SamplingOptions):
    """Run the trained circuits on a source.

    Args:    source: a name in `qpa.circuits.sources.source.SOURCES`; None means the one that trained, with
             its shots and its backend.
             mitigation: how the counts are corrected, names of
             `qpa.circuits.mitigation.mitigation.MITIGATIONS` joined by "+", in their order; "none" for not.
             shots, backend, session, batch, yes: see `SamplingOptions`.
             context: the name of the context whose angles are measured; None means the first.
             context_prompt: the text of a prompt instead, where prompts are the contexts.
             trust_remote_code: the user allows the model's own Python code to run, which reads a prompt.
    Source:  ours.
    """

    name: ClassVar[str] = "measure-circuit"
    consumes: ClassVar[type] = TrainedGenerator
    requires: ClassVar[tuple[type[Document], ...]] = (AdapterSpec, WeightLayout, LogicalCircuit)
    produces: ClassVar[type[Document]] = Measurement
    section: ClassVar[str] = "freeze"

    source: str | None = option(
        None,
        help="What runs the trained circuits once more: {choices}.",
        choices=SOURCES,
        shown_default="what ran them in training",
        panel=SamplingOptions.panel,
    )
    mitigation: str = option(
        NONE,
        help="How counts are corrected for errors: none, or names joined by +, such as depolarizing or "
        "readout+depolarizing.",
        panel=SamplingOptions.panel,
    )

    context: str | None = option(
        None, help="Which of the plan's contexts to freeze, by its name.", shown_default="the first"
    )
    context_prompt: str | None = option(
        None,
        help="A text that tells the context instead, where the plan's contexts are of kind prompt.",
        shown_default="none",
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def run(self, source: TrainedGenerator, context: PassContext) -> Measurement:
        """Return the measurement; leave its counts and probabilities in the context's files.

        Raises:  OptionError: there is no such source or context, the source cannot use the options, or
                 they are given where there is nothing to measure.
                 DocumentError: a file is missing or damaged, or the angles are not the circuit's.
                 SourceError: what runs the circuits fails.
        """
        name = self.source or source.source
        self.check(name)
        layout = context.document(WeightLayout)
        self.check_plan(layout)
        facts, vector = dict(_NOTHING), None
        if layout.features.has_circuits or layout.features.contexts is not None:
            facts, vector = self._facts(source, layout, context)
        return Measurement(
            provenance=context.provenance(self, source),
            source=name,
            backend=self._inherited(source, "backend"),
            mitigation=self.mitigation,
            context=self._measured_context(layout, vector, context),
            **facts,
        )

    def _facts(
        self, trained: TrainedGenerator, layout: WeightLayout, context: PassContext
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Return what a measurement says, and the context that was measured, of a training's arrays."""
        from safetensors.torch import load_file

        from qpa.generators.generator import angles_of

        arrays = load_file(context.files.get(trained.arrays))
        vector = self._vector(arrays, layout, trained, context)
        if not layout.features.has_circuits:
            return dict(_NOTHING), vector
        angles = angles_of(layout, arrays, vector)
        return self._measure(angles, self._source(trained, context), context), vector

    def check_plan(self, layout: WeightLayout) -> None:
        """Check that a plan has the context that is to be frozen, and circuits where they are to be run.

        Raises:  OptionError: it does not.
        """
        refuse_without_circuits(self, layout)
        contexts = layout.features.contexts
        for name, value in (("context", self.context), ("context_prompt", self.context_prompt)):
            if value is not None and contexts is None:
                raise OptionError(name, "none, since the plan has no `contexts`", value, "leave it out")
        if contexts is None:
            return
        if self.context is not None and self.context not in contexts.names:
            raise unknown_name("context", contexts.names, self.context)
        if self.context_prompt is not None and contexts.kind != "prompt":
            expected = f"`context`, one of {one_of(contexts.names)}"
            raise OptionError("context_prompt", expected, self.context_prompt)
        if self.context is not None and self.context_prompt is not None:
            raise OptionError("context_prompt", "one of `context` and `context_prompt`", "both")

    def _vector(
        self,
        arrays: Mapping[str, Tensor],
        layout: WeightLayout,
        trained: TrainedGenerator,
        context: PassContext,
    ) -> Tensor | None:
        """Return the numbers that tell the context, float32[size]; None where the plan has no contexts."""
        from qpa.generators.fast_weights import contexts_of
        from qpa.generators.generator import load_generator

        contexts = layout.features.contexts
        if contexts is None:
            return None
        vectors = contexts_of(load_generator(layout, arrays))
        if self.context_prompt is None:
            index = contexts.names.index(self.context or contexts.names[0])
            return vectors.vectors[index].detach().clone()
        from qpa.models.base_model import load_model, load_tokenizer
        from qpa.training.contexts import context_of_rows, rows_of_prompt

        base, trust = context.document(AdapterSpec).base, self.trust_remote_code
        context.progress("reading the prompt", 0, 1)
        model = load_model(base, keep_dtype=False, trust_remote_code=trust)
        tokenizer = load_tokenizer(base, trust_remote_code=trust)
        max_length = trained.provenance.option_values["max_length"]
        assert isinstance(max_length, int)
        rows = rows_of_prompt(tokenizer, self.context_prompt, max_length)
        return context_of_rows(model, rows, vectors, layout.seed)

    def _measured_context(
        self, layout: WeightLayout, vector: Tensor | None, context: PassContext
    ) -> MeasuredContext | None:
        if layout.features.contexts is None or vector is None:
            return None
        name = self.context or layout.features.contexts.names[0]
        return MeasuredContext(
            name=None if self.context_prompt is not None else name,
            prompt=self.context_prompt,
            vector=context.put_tensors({"context": vector}),
        )

    def check(self, source: str) -> None:
        """Check the options before anything is run.

        Args:    source: the name of the source that will measure.
        Raises:  OptionError: one is out of range, or a mitigation is asked for where nothing is sampled.
        """
        from qpa.circuits.sources.sampled import SampledSource

        check_options(self)
        if parse_mitigations(self.mitigation) and not issubclass(SOURCES[source], SampledSource):
            raise OptionError("mitigation", f"none for the source {source}", self.mitigation)

    def cost(self, trained: TrainingOptions, context: PassContext) -> Cost | None:
        """Return what the measurement after a training will cost; None where nothing is sampled.

        Args:    trained: the options of the training; context: of the plan.
        Raises:  OptionError: see `run`.
        """
        layout = context.document(WeightLayout)
        self.check_plan(layout)  # before a training, which would be in vain
        runs_on = self._source(trained, context)
        if runs_on.shots is None or not layout.features.has_circuits:
            return None
        return self._cost(runs_on, load_circuit(context, native=runs_on.runs_native), layout.n_circuits)

    def _cost(self, runs_on: Source, circuit: Circuit, n_circuits: int) -> Cost:
        """Return the cost of the circuits and of what their mitigation measures besides."""
        mitigations = parse_mitigations(self.mitigation)
        calls = [n_circuits, *(n for one in mitigations for n in one.calls(circuit, n_circuits))]
        return total(*(runs_on.cost(circuit, n) for n in calls))

    def _inherited(self, trained: Trained, option_: str) -> Any:
        """Return an option's value; where no other source is asked for, by default that of the training."""
        value = getattr(self, option_)
        is_the_same = self.source in (None, trained.source)
        return getattr(trained, option_) if value is None and is_the_same else value

    def _source(self, trained: Trained, context: PassContext) -> Source:
        options = SamplingOptions(
            shots=self._inherited(trained, "shots"),
            backend=self._inherited(trained, "backend"),
            session=self.session,
            batch=self.batch,
            yes=self.yes,
        )
        return options.make_source(self.source or trained.source, context.seed_for(self.name))

    def _measure(self, angles: Tensor, runs_on: Source, context: PassContext) -> dict[str, Any]:
        """Return what a measurement says of a run of the circuits."""
        from qpa.circuits.sources.sampled import SampledSource

        circuit = load_circuit(context, native=runs_on.runs_native)
        mitigations = parse_mitigations(self.mitigation)
        cost = self._cost(runs_on, circuit, len(angles))
        self.check_consent(runs_on, cost)
        context.progress("measuring the circuits", 0, 1)
        exact = circuit.exact_probabilities(angles)
        counts: dict[str, Tensor] = {}
        if isinstance(runs_on, SampledSource):
            counts |= calibrate(mitigations, runs_on, circuit, angles)
            counts[COUNTS] = runs_on.counts(circuit, angles)
            measured = corrected(mitigations, counts[COUNTS], circuit, counts)
        else:
            measured = runs_on.probabilities(circuit, angles)
        put = context.put_tensors
        return {
            "target": circuit.target,
            "shots": runs_on.shots,
            "n_executions": cost.n_executions,
            "counts": put({name: part.contiguous() for name, part in counts.items()}) if counts else None,
            **(_as_run(context) if runs_on.runs_native else _NO_CIRCUIT),
            "probabilities": put({"probabilities": measured.contiguous()}),
            "distance": min(1.0, float(0.5 * (measured - exact).abs().sum(1).max())),
        }


def probabilities_of(measurement: Measurement, context: PassContext) -> Tensor | None:
    """Return the probabilities that a measurement's counts give, computed once more.

    Returns: float32[n_circuits, 2**n_qubits]; None where there are no counts.
    Raises:  DocumentError: a file is missing or damaged.
    """
    from safetensors.torch import load_file

    if measurement.counts is None:
        return None
    counts = load_file(context.files.get(measurement.counts))
    ansatz = context.document(LogicalCircuit).ansatz
    circuit = Circuit(ansatz, lacks_last_layer=measurement.lacks_last_layer)
    return corrected(parse_mitigations(measurement.mitigation), counts[COUNTS], circuit, counts)


def _as_run(context: PassContext) -> dict[str, Any]:
    """Return what a measurement keeps of the native circuit, with copies of its files."""
    native = context.document(NativeCircuit)
    return {
        "calibrated": native.calibrated,
        "physical_qubits": native.physical_qubits,
        "lacks_last_layer": native.lacks_last_layer,
        **files_as_run(native, context),
    }
