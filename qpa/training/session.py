"""One training, from top to bottom: prepare, calibrate, fit, score, record.

`train` is the whole of it. What it needs is made in `qpa.training.preparation` and nowhere else; what it
leaves is written in `_start_log`, in the callback of the trainer and in `qpa.training.recording`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qpa.documents import AdapterSpec, ChosenBank, Provenance, TrainedGenerator, WeightLayout
from qpa.errors import OtherDataError
from qpa.generators.fast_weights import contexts_of
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.atomic_files import remove_leftovers
from qpa.store.run_directory import METRICS
from qpa.training.calibration import choose_rows
from qpa.training.checkpoints import Resumed, newest_checkpoint, remove_checkpoints
from qpa.training.contexts import set_contexts
from qpa.training.fitting import choose, fit, is_over, score
from qpa.training.objectives.objective import LOSS, as_metrics
from qpa.training.on_basis import take_directions
from qpa.training.preparation import Session, prepare
from qpa.training.processes import ALONE, Processes, naming_lost_processes
from qpa.training.recording import adapters_of, record
from qpa.training.training_log import TrainingLog
from qpa.training.training_options import TrainingOptions


def train(
    options: TrainingOptions, provenance: Provenance, context: PassContext, processes: Processes = ALONE
) -> TrainedGenerator | None:
    """Train a generator and describe what came of it.

    Args:    options: `grad_accum` counts the micro-batches of all processes.
             provenance: of the document that is returned, and of all checkpoints.
             context: holds the plan; arrays, metrics and checkpoints are left in its files.
             processes: that train together; the first one alone writes files.
    Returns: nothing in the other processes.
    Raises:  OptionError, ModelError, DataError, CheckpointError: something that the training needs is wrong;
             what an earlier training left is untouched.
             DivergedError: a loss or gradient is not finite; the last checkpoint stays.
    """
    with naming_lost_processes():
        return _train(prepare(options, provenance, context, processes))


def _train(session: Session) -> TrainedGenerator | None:
    resumed = _checkpoint_to_resume(session)
    spec = session.context.document(AdapterSpec)
    start = None if spec.parent is None else score(session, "evaluating the parent adapter", step=0)
    with session.adapted.model.disable_adapter():
        before = score(session, "evaluating the base model", step=0)
    log = _start_log(session, resumed, before, start) if session.processes.is_first else None
    bank = calibrate(session) if resumed is None else resumed[1].bank
    fitted = fit(session, resumed, log, bank)
    frozen_step, after = choose(session, fitted)
    session.adapted.optimizer.check_same("at the end")
    adapters = adapters_of(session)
    if log is None:
        return None
    frozen = {"frozen_step": frozen_step} if session.options.freezes_best else {}
    log.write(fitted.n_steps, {**as_metrics(after), **frozen})
    session.trackers.close()
    return record(session, adapters, before, after, fitted.n_steps, frozen_step, bank)


def calibrate(session: Session) -> ChosenBank | None:
    """Give the generator's spectra their directions: of the gradient of a few batches, or of a basis.

    Returns: the bank of the basis, where there is one.
    """
    context, rows = session.context, session.splits.training
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    if layout.features.contexts is not None and layout.features.contexts.kind == "prompt":
        vectors = contexts_of(session.adapted.generator)
        of_tasks = [task.splits.training for task in session.tasks]
        set_contexts(session.adapted.model, vectors, of_tasks, layout.seed)
    chosen = choose_rows(len(rows), session.options.batch_size, context.seed_for("calibration"))
    batches = [[rows[index] for index in batch] for batch in chosen]
    context.progress("reading the gradient", 0, 1)

    def loss(batch: Any) -> Tensor:
        return session.objective.calibration_loss(session.adapted.model, batch)

    if session.basis is not None:
        return take_directions(session.adapted, session.basis, spec, loss, batches)
    session.adapted.calibrate(spec, loss, batches)
    return None


def _checkpoint_to_resume(session: Session) -> Resumed | None:
    """Return the newest checkpoint, where one is asked for.

    Raises:  CheckpointError: there is none, or it is not this training's.
    """
    if not session.options.resume:
        return None
    path, document = newest_checkpoint(session.checkpoints, session.saved_as, session.older_digests)
    if document.data_digest != session.data_digest:
        raise OtherDataError(str(path), "the data it was trained on", "other data in the same files")
    return path, document


def _start_log(
    session: Session,
    resumed: Resumed | None,
    before: Mapping[str, float],
    start: Mapping[str, float] | None,
) -> TrainingLog:
    """Start metrics.jsonl over, and forget what an earlier training gave; or cut it at the checkpoint.

    Args:    before, start: the scores of the base model, and of the adapter that it goes on from.
    """
    files = session.context.files
    if resumed is not None:
        remove_leftovers(session.checkpoints)
        return TrainingLog(
            files.path / METRICS,
            resumed[1].step,
            is_over=is_over(session, resumed),
            listen=session.trackers.log,
        )
    files.drop_from(TrainedGenerator)
    remove_checkpoints(session.checkpoints)
    log = TrainingLog(files.path / METRICS, listen=session.trackers.log)
    cost = session.step_cost
    costs = {"step_circuits": cost.n_circuits, "step_executions": cost.n_executions, "step_jobs": cost.n_jobs}
    started = {} if start is None else {"start_loss": start[LOSS]}
    log.write(0, {**as_metrics(before), **started, **costs})
    return log
