"""The stage plan: the adapter's tensors, the layout of its generator, and the circuit for a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from qpa.circuits.circuit_options import refuse_without_circuits
from qpa.documents import (
    AdapterSpec,
    Document,
    FrozenAdapter,
    LogicalCircuit,
    NativeCircuit,
    Selection,
    SharedBasis,
    WeightLayout,
)
from qpa.errors import StaleError
from qpa.exporters.registry import known
from qpa.passes import planning_pipeline, transpilation_pipeline
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.synthesize_circuit import SynthesizeCircuit
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.atomic_files import sha256_of
from qpa.store.run_directory import DirectoryStore, RunDirectory
from qpa.workflow.changes import attachments_of, changed_options, missing_file
from qpa.workflow.inputs import MODEL
from qpa.workflow.resolved import formats_of
from qpa.workflow.stage import NOT_MADE, Work


class Plan:
    """Plan the adapter in place; a plan of which only the device changed is transpiled once more."""

    name: ClassVar[str] = "plan"

    def __init__(self) -> None:
        self.carries = True

    def change(self, work: Work) -> str | None:
        """See `Stage`; where only the circuit's device changes, what was trained may stay."""
        for kind, maker in _made_by(work):
            why = _change(kind, maker, work)
            if why is not None:
                self.carries = kind is not NativeCircuit
                return why
        return None

    def make(self, work: Work) -> str:
        """Plan anew, or transpile alone."""
        from qpa.report.facts import plan_title

        work.configuration.make(TrainGenerator).check()  # before a plan is replaced that may be trained
        inspect, layout, _, transpile = (maker for _, maker in _made_by(work))
        if self.carries:
            context = _replan(planning_pipeline(inspect, layout, transpile), work)
        else:
            context = transpilation_pipeline(transpile).run(
                None, work.context(LogicalCircuit), work.run.write
            )
        work.run.files.drop_from(Selection)
        account = context.document(WeightLayout).account
        return f"{plan_title(context.documents)}; {account.n_generator:,} trained numbers"


def _replan(pipeline: Pipeline, work: Work) -> PassContext:
    """Plan beside the plan that is there, and put the new one in its place when all of it is right."""
    with TemporaryDirectory() as beside:
        files = DirectoryStore(Path(beside))
        context = pipeline.run(None, PassContext(work.configuration.seed, files, (), work.progress))
        _check_later_stages(context.document(WeightLayout), work)
        for document in context.documents:
            for attachment in attachments_of(document):
                work.run.files.put(attachment.file, files.get(attachment).read_bytes())
            work.run.write(document)
    return replace(context, files=work.run.files)


def _check_later_stages(layout: WeightLayout, work: Work) -> None:
    """Check, before the plan that is there goes, that a new one can be trained, frozen and exported as asked.

    Raises:  OptionError, ExportError: it cannot.
    """
    make = work.configuration.make
    refuse_without_circuits(make(TrainGenerator), layout)
    make(MeasureCircuit).check_plan(layout)
    for name in formats_of(work.configuration):
        why = known(name).refusal_of(layout)
        if why is not None:
            raise why


def _made_by(work: Work) -> tuple[tuple[type[Document], Any], ...]:
    make = work.configuration.make
    return (
        (AdapterSpec, make(InspectModel)),
        (WeightLayout, make(PlanLayout)),
        (LogicalCircuit, SynthesizeCircuit()),
        (NativeCircuit, make(TranspileCircuit)),
    )


def _change(kind: type[Document], maker: Any, work: Work) -> str | None:
    if not work.run.has(kind):
        return NOT_MADE
    try:
        document = work.run.read(kind)
    except StaleError as error:
        return f"{error.subject} is stale"
    if words := changed_options(document.provenance, maker, work.configuration.seed):
        return ", ".join(words)
    if isinstance(document, AdapterSpec) and (other := _other_source(document, maker, work)):
        return other
    return missing_file(document, work.run.files)


def _other_source(spec: AdapterSpec, inspect: InspectModel, work: Work) -> str | None:
    """Return in words what a plan was read from and is another now: its basis, its parent or the config."""
    basis, parent = spec.basis, spec.parent
    for key, place, then, digest_of in (
        ("plan.basis", inspect.basis, basis and basis.digest, _digest_of_basis),
        ("plan.continue_from", inspect.continue_from, parent and parent.arrays.sha256, _digest_of_run),
    ):
        if place is None and then is not None:
            return f"{key} is no longer given"
        if place is not None and then != digest_of(Path(place)):
            return f"{key} {place} is {'new' if then is None else 'another'}"
    base = spec.base
    if not _is_that_of_the_training(work):
        from qpa.models.base_model import config_file_digest

        if config_file_digest(base.name_or_path, revision=base.revision) != base.config_digest:
            return f"the config of {base.name_or_path} changed"
    return None


def _digest_of_basis(directory: Path) -> str | None:
    """Return the digest by which plans name a basis; None where there is none, which planning says."""
    file = directory / SharedBasis.file_name()
    return sha256_of(file) if file.is_file() else None


def _digest_of_run(directory: Path) -> str | None:
    """Return the SHA-256 of a run's frozen tensors; None where there are none, which planning says."""
    run = RunDirectory(directory)
    return run.read(FrozenAdapter).arrays.sha256 if run.has(FrozenAdapter) else None


def _is_that_of_the_training(work: Work) -> bool:
    """Return whether the base model is what it was in the training: then its config is that of the plan."""
    now, then = (
        [one.digest for one in inputs if one.option == MODEL]
        for inputs in (work.inputs, work.trained.inputs if work.trained else ())
    )
    return now == then
