"""Run a configuration: plan, train, freeze, and for every format export and verify.

Rules:
1. A stage that is done, and of which nothing that it is made from has changed, is left out. What counts are
   digests of documents and inputs, options and the seed; no times, and not the version of qpa.
2. What changed is done again, with what is made from it; why is said before.
3. An interrupted training goes on from its newest checkpoint, if that is of the same plan, options and data.
4. What can be known to be wrong is refused before anything is made or replaced.
5. Only a run that this function made is changed without `force`.
6. The resolved configuration is a document of the run: it is there as soon as there is a plan, and
   says what the trained generator was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qpa.documents import (
    ResolvedConfiguration,
    TrainedGenerator,
)
from qpa.documents.manifest import FORMATS
from qpa.errors import ConfigurationError, DirectoryError, DocumentError, one_of
from qpa.exporters.registry import formats_for, known
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.configuration import Configuration
from qpa.pipeline.options import check_options
from qpa.progress import Progress, silent
from qpa.store.run_directory import CHECKPOINTS, RunDirectory, list_checkpoints
from qpa.training.continuation import ContinuePrompts
from qpa.workflow.exporting import Export, Verify
from qpa.workflow.inputs import check_inputs, read_inputs
from qpa.workflow.planning import Plan
from qpa.workflow.reporting import Report, ReportOptions
from qpa.workflow.resolved import drop_report, formats_of, keep_configuration
from qpa.workflow.stage import NOT_MADE, Stage, Work
from qpa.workflow.training import Freeze, Train

_ALL = (
    *(InspectModel, PlanLayout, TranspileCircuit, TrainGenerator, MeasureCircuit, FreezeAdapter),
    *(ContinuePrompts, ReportOptions),
)


@dataclass(frozen=True)
class Done:
    """What became of a stage.

    Args:    name: of the stage.
             why: why it was done; None where it was left out, because nothing has changed.
             result: in words; "" where it was left out, or would only be done.
    """

    name: str
    why: str | None
    result: str


def run_configuration(
    configuration: Configuration,
    *,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
    force: bool = False,
    dry_run: bool = False,
) -> tuple[Done, ...]:
    """Do all stages of a run that are not done yet, or of which something has changed.

    Args:    say: called with a line for every stage.
             force: do all of it anew, and replace what another command has made.
             dry_run: only say what would be done.
    Raises:  ConfigurationError: an option is missing, or wrong beside others; the error names its line.
             DirectoryError: the run directory is another thing, in use, or another command's.
             QpaError: what the passes and exporters raise.
    """
    with configuration.locating_errors():
        _check(configuration)
        if dry_run and not configuration.out.exists():
            return tuple(_would_do(one, NOT_MADE, say) for one in _stages(configuration))
        run = RunDirectory.at(configuration.out)
        with run.locked():
            work = _begin(configuration, run, say, progress, force=force)
            return tuple(_do_all(work, force=force, dry_run=dry_run))


def _check(configuration: Configuration) -> None:
    """Check all options before anything is done."""
    for maker in _ALL:
        check_options(configuration.make(maker))
    check_options(configuration.make(VerifyAdapter, directory=""))
    measure = configuration.make(MeasureCircuit)
    measure.check(measure.source or configuration.make(TrainGenerator).source)
    inspect = configuration.make(InspectModel)
    carrying = formats_for(inspect.method)
    for format_ in formats_of(configuration):
        if format_ not in carrying:
            expected = f"{one_of(carrying)}, which carry the adapter"
            raise ConfigurationError(configuration.place_of(f"export.{format_}"), expected, format_)
        exporter = configuration.make(known(format_))
        exporter.check_options()
        if exporter.needs_basis and inspect.basis is None:
            place, expected = configuration.place_of("plan.basis"), f"a directory of qpa basis, for {format_}"
            raise ConfigurationError(place, expected, "none")


def _stages(configuration: Configuration) -> list[Stage]:
    formats = formats_of(configuration)
    exports = [stage for name in formats for stage in _stages_of(name)]
    return [Plan(), Train(), Freeze(), *exports, Report()]


def _stages_of(format_: str) -> tuple[Stage, ...]:
    """Return the stages of an export; a file records no answers for an engine to be compared with."""
    return (Export(format_),) if FORMATS[format_].is_file else (Export(format_), Verify(format_))


def _begin(
    configuration: Configuration,
    run: RunDirectory,
    say: Callable[[str], None],
    progress: Progress,
    *,
    force: bool,
) -> Work:
    """Read what the run was before, and check that it may be changed."""
    file = run.path / ResolvedConfiguration.file_name()
    before = None
    if file.is_file() and not force:
        with _advising_force():
            before = ResolvedConfiguration.from_json(file.read_bytes(), str(file))
    is_trained = run.has(TrainedGenerator) or list_checkpoints(run.path / CHECKPOINTS)
    if before is None and is_trained and not force:
        expected, found = "a run that qpa run made", "one that another command has trained"
        advice = "choose another `out`, or pass `force` to replace it"
        raise DirectoryError(str(run.path), expected, found, advice)
    trained = before.trained if before else None
    check_inputs(configuration, before)
    inputs = read_inputs(configuration)
    work = Work(configuration, run, before, inputs, progress, say, trained, may_resume=not force)
    for one in _stages(configuration):
        if isinstance(one, Export):
            one.check(work, force=force)
    return work


def _do_all(work: Work, *, force: bool, dry_run: bool) -> Iterator[Done]:
    carried = NOT_MADE if force else None
    is_changed = False
    for one in _stages(work.configuration):
        why = carried or (NOT_MADE if is_changed and isinstance(one, Report) else _change(one, work))
        is_changed = is_changed or why is not None
        if why is None:
            work.say(f"{one.name}: unchanged")
            yield Done(one.name, None, "")
        elif dry_run:
            yield _would_do(one, why, work.say)
            carried = NOT_MADE if one.carries else carried
        else:
            if why != NOT_MADE:
                work.say(f"{one.name}: again ({why}){_what_is_lost(one, work)}")
            if not one.carries:
                drop_report(work)  # what carries drops it with the documents that it replaces
            result = one.make(work)
            work.say(f"{one.name}: {result}")
            yield Done(one.name, why, result)
        if not dry_run:
            keep_configuration(work)  # from the plan on, and with what the trained generator was made from


def _change(stage: Stage, work: Work) -> str | None:
    with _advising_force():
        return stage.change(work)


@contextmanager
def _advising_force() -> Iterator[None]:
    try:
        yield
    except DocumentError as error:
        raise error.with_advice("`force` makes the whole run anew") from error


def _would_do(stage: Stage, why: str, say: Callable[[str], None]) -> Done:
    say(f"{stage.name}: would be done" + ("" if why == NOT_MADE else f" again ({why})"))
    return Done(stage.name, why, "")


def _what_is_lost(stage: Stage, work: Work) -> str:
    is_lost = isinstance(stage, Plan | Train) and stage.carries and work.run.has(TrainedGenerator)
    return "; the trained generator is replaced" if is_lost else ""
