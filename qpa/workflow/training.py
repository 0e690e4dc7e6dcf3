"""The stages train and freeze: the generator is trained, measured once more, and left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

from qpa.documents import (
    Attachment,
    Checkpoint,
    Document,
    FrozenAdapter,
    Input,
    LogicalCircuit,
    Measurement,
    NativeCircuit,
    Provenance,
    TrainedFrom,
    TrainedGenerator,
)
from qpa.errors import (
    CheckpointError,
    DivergedError,
    DocumentError,
    OtherDataError,
    ProcessError,
    SourceError,
    StaleError,
)
from qpa.passes import PLANNED, freezing_pipeline
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.train_generator import TrainGenerator
from qpa.pipeline.pass_protocol import PassContext, newest
from qpa.pipeline.pipeline import Pipeline
from qpa.report.costs import cost_lines
from qpa.store.run_directory import CHECKPOINTS, RunDirectory, has_parents, list_checkpoints, older_digests
from qpa.termination import Terminated
from qpa.training.processes import n_started
from qpa.workflow.changes import changed_options, missing_file
from qpa.workflow.inputs import OF_THE_PLAN, changed_inputs
from qpa.workflow.resolved import keep_configuration
from qpa.workflow.stage import NOT_MADE, Work


class Train:
    """Train the generator, or go on from the newest checkpoint of the same training."""

    name: ClassVar[str] = "train"
    carries: ClassVar[bool] = True

    def change(self, work: Work) -> str | None:
        """See `Stage`; which data it was trained on is in the resolved configuration."""
        run = work.run
        if not run.has(TrainedGenerator):
            return NOT_MADE
        try:
            document = run.read(TrainedGenerator)
        except StaleError as error:
            return f"{error.subject} is stale"
        # What several processes trained stays as it is, however many there are now.
        n_processes = work.trained.n_processes if work.trained else None
        step = work.configuration.make(TrainGenerator).as_one(n_processes)
        words = changed_options(document.provenance, step, work.configuration.seed)
        if work.trained is None or work.trained.document != run.written_digest(TrainedGenerator):
            words.append("another command trained it")
        else:
            words += changed_inputs(*map(_read_by_training, (work.trained.inputs, work.inputs)))
        if not _ran_this(document.circuit, run):
            words.append("the device's circuit changed")
        return ", ".join(words) or missing_file(document, run.files)

    def make(self, work: Work) -> str:
        """Train, and write down what was read for it."""
        context = work.context(NativeCircuit)
        basis = work.configuration.make(InspectModel).basis  # where it is now, whatever place the plan says
        step = replace(work.configuration.make(TrainGenerator), basis=basis)
        for line in cost_lines(step, work.configuration.make(MeasureCircuit), context):
            work.say(line)
        resumed, words = _resumed(step.as_one(), context, work)
        if words:
            work.say(f"{self.name}: {words}")
        with _going_on_by_itself():
            try:
                trained = _train(replace(step, resume=resumed), context, work)
            except OtherDataError as error:
                work.say(f"{self.name}: from the start, since {error.subject} is of other data")
                trained = _train(step, context, work)
        result = trained.result
        loss = f"loss {result.base_loss:.4f} -> {result.eval_loss:.4f} on the evaluation split"
        return f"{result.n_steps:,} steps, {loss}"


class Freeze:
    """Measure the trained circuits, and decode what was measured."""

    name: ClassVar[str] = "freeze"
    carries: ClassVar[bool] = True

    def change(self, work: Work) -> str | None:
        """See `Stage`."""
        run = work.run
        if not run.has(FrozenAdapter):
            return NOT_MADE
        try:
            documents = run.read_through(FrozenAdapter)
        except StaleError as error:
            return f"{error.subject} is stale"
        step, seed = work.configuration.make(MeasureCircuit), work.configuration.seed
        measured = newest(documents, Measurement)
        if words := changed_options(measured.provenance, step, seed):
            return ", ".join(words)
        if not _ran_this(measured.circuit, run):
            return "the device's circuit changed"
        return missing_file(measured, run.files) or missing_file(newest(documents, FrozenAdapter), run.files)

    def make(self, work: Work) -> str:
        """Measure and freeze.

        Raises:  SourceError: what runs the circuits fails; the training is kept.
        """
        context = work.context(TrainedGenerator)
        make = work.configuration.make
        measure = make(MeasureCircuit)
        trained = context.document(TrainedGenerator)
        measure.check(measure.source or trained.source)
        try:
            context = freezing_pipeline(measure, make(FreezeAdapter)).run(trained, context, work.run.write)
        except SourceError as error:
            raise error.with_advice(
                "the training is done, and the same command goes on from there"
            ) from error
        frozen = context.document(FrozenAdapter)
        words = f"measured by {frozen.source}" + (f", {frozen.shots:,} shots" if frozen.shots else "")
        words += f", for {frozen.context}" if frozen.context else ""
        if frozen.arrays == trained.live(frozen.context).adapter or frozen.frozen_loss is None:
            return words
        return f"{words}, loss {frozen.frozen_loss:.4f}"


def _train(step: TrainGenerator, context: PassContext, work: Work) -> TrainedGenerator:
    def keep(document: Document) -> None:
        # What it was made from comes first: whenever this is killed, no generator is of unknown origin.
        work.trained = TrainedFrom(document=document.digest, inputs=work.inputs, n_processes=n_started())
        keep_configuration(work)
        work.run.write(document)

    pipeline = Pipeline(step, given=PLANNED)
    return pipeline.run(context.document(LogicalCircuit), context, keep).document(TrainedGenerator)


@contextmanager
def _going_on_by_itself() -> Iterator[None]:
    """Say how a run goes on, which takes no option for it."""
    try:
        yield
    except (CheckpointError, DivergedError, ProcessError, SourceError) as error:
        advice = _advice(error.advice)
        raise type(error)(error.subject, error.expected, error.found, advice) from error
    except Terminated as end:
        raise Terminated(_advice(end.saved)) from end


def _advice(text: str) -> str:
    text = text.replace("go on with `resume`", "the same command goes on")
    return text.replace("train without `resume`", "pass `force` to do everything anew")


def _ran_this(circuit: Attachment | None, run: RunDirectory) -> bool:
    """Return whether no circuit was run on a device, or the native circuit of now."""
    return circuit is None or (
        run.has(NativeCircuit) and run.read(NativeCircuit).qpy.sha256 == circuit.sha256
    )


def _read_by_training(inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """Return what a training reads besides its plan, which tells when its basis or its parent is another."""
    return tuple(one for one in inputs if one.option not in OF_THE_PLAN)


def _resumed(step: TrainGenerator, context: PassContext, work: Work) -> tuple[bool, str]:
    """Return whether a training can go on from a checkpoint, and what a user should know of it."""
    found = list_checkpoints(work.run.path / CHECKPOINTS)
    if not found or not work.may_resume or work.run.has(TrainedGenerator):
        return False, ""
    file = found[-1] / Checkpoint.file_name()
    try:
        document = Checkpoint.from_json(file.read_bytes(), str(file))
    except (OSError, DocumentError):
        return True, ""  # the training says what is wrong with it
    planned = context.provenance(step, context.document(LogicalCircuit))
    words = _differences(document.provenance, planned, context, step, work)
    if words:
        return False, f"from the start, not from the checkpoints of another training ({', '.join(words)})"
    return True, f"goes on from step {document.step:,}"


def _differences(
    written: Provenance, wanted: Provenance, context: PassContext, step: TrainGenerator, work: Work
) -> list[str]:
    """Return in words what the training that wrote a checkpoint had otherwise."""
    if not has_parents(written, wanted.parents, older_digests(work.run.path, context.documents)):
        return ["the plan"]
    return changed_options(written, step, work.configuration.seed)
