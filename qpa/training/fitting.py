"""The steps of a training: from its start or a checkpoint to the last, and back to the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from transformers import PrinterCallback

from qpa.compat.transformers_ import keep_weights_on_resume
from qpa.documents import AdapterSpec, ChosenBank, WeightLayout
from qpa.errors import DivergedError, SourceError
from qpa.termination import deferring_sigterm
from qpa.training.checkpoints import (
    Resumed,
    best_evaluation,
    checkpoint_path,
    read_checkpoint,
    restore_optimizer,
)
from qpa.training.generator_callback import GeneratorCallback, is_patience_over
from qpa.training.objectives.objective import LOSS
from qpa.training.on_basis import settle
from qpa.training.preparation import Session
from qpa.training.tasks import score_tasks
from qpa.training.training_log import TrainingLog


class Fitted(NamedTuple):
    """What came of the steps.

    Args:    n_steps: how many there were.
             best: the step of the best evaluation before the last step, and its loss; None for none.
    """

    n_steps: int
    best: tuple[int, float] | None


def fit(
    session: Session, resumed: Resumed | None, log: TrainingLog | None, bank: ChosenBank | None
) -> Fitted:
    """Take all optimizer steps, or those that are left after a checkpoint.

    Args:    bank: whose directions the generator has, which checkpoints tell.
    Raises:  DivergedError: a gradient is not finite; the error names the last good checkpoint.
             SourceError: what runs the circuits fails; likewise.
             Terminated: SIGTERM came, and the step under way is saved.
    """
    if resumed is not None and is_over(session, resumed):
        restore_optimizer(resumed[0], session.adapted.optimizer, resumed[1])
        return Fitted(resumed[1].step, best_evaluation(resumed[0]))
    with deferring_sigterm() as asks_to_end:
        return _take_steps(session, resumed, log, bank, asks_to_end)


def _take_steps(
    session: Session,
    resumed: Resumed | None,
    log: TrainingLog | None,
    bank: ChosenBank | None,
    asks_to_end: Callable[[], bool],
) -> Fitted:
    callback = GeneratorCallback(
        options=session.options,
        peft_model=session.adapted.model,
        optimizer=session.adapted.optimizer,
        log=log,
        progress=session.context.progress,
        root=session.checkpoints,
        save_steps=1 if session.is_paid else session.options.save_steps,
        seed=session.context.seed_for("steps"),
        provenance=session.saved_as,
        data_digest=session.data_digest,
        bank=bank,
        asks_to_end=asks_to_end,
        processes=session.processes,
        evaluate=lambda step: score(session, "evaluating", step=step),
        scaler=session.trainer.accelerator.scaler,
        resume_from=resumed,
    )
    trainer = session.trainer
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    keep_weights_on_resume(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
    except (DivergedError, SourceError) as error:
        saved = callback.last_saved
        kept = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
        goes_on = "go on with `resume`" if isinstance(error, SourceError) and saved else ""
        raise error.with_advice(kept, goes_on) from error
    state = trainer.state
    best = None if state.best_metric is None else (int(state.best_global_step), float(state.best_metric))
    return Fitted(state.global_step, best)


def is_over(session: Session, resumed: Resumed) -> bool:
    """Return whether no step is left after a checkpoint."""
    path, document = resumed
    best = best_evaluation(path)
    stops = best is not None and is_patience_over(session.options, document.step, best[0])
    return stops or document.step >= session.n_steps


def choose(session: Session, fitted: Fitted) -> tuple[int, Mapping[str, float]]:
    """Score the model after the last step, or, where the best is to be frozen, set it back to that.

    Returns: the number of steps after which the generator was as it is now, and its scores.
    Raises:  CheckpointError: the best checkpoint is missing or damaged.
             DivergedError: the loss is not finite.
    """
    _settle(session)
    last = score(session, "evaluating the adapted model", step=fitted.n_steps)
    if not session.options.freezes_best or fitted.best is None or last[LOSS] < fitted.best[1]:
        return fitted.n_steps, last
    step, _ = fitted.best
    path = checkpoint_path(session.checkpoints, step)
    document = read_checkpoint(path, session.saved_as, session.older_digests, "train again")
    restore_optimizer(path, session.adapted.optimizer, document)
    _settle(session)
    return step, score(session, "evaluating the best model", step=step)


def _settle(session: Session) -> None:
    spec, layout = session.context.document(AdapterSpec), session.context.document(WeightLayout)
    settle(session.adapted, spec, layout, session.options.source)


def score(session: Session, description: str, *, step: int) -> Mapping[str, float]:
    """Return the objective's scores of the model as it is, on the evaluation split.

    Raises:  DivergedError: the loss is not finite.
    """
    model, objective, progress = session.adapted.model, session.objective, session.context.progress
    if session.tasks:
        optimizer = session.adapted.optimizer
        own = score_tasks(objective, model, session.tasks, optimizer, progress, description)
    else:
        own = objective.scores(model, session.splits.evaluation, progress, description)
    scores = session.processes.share_numbers(own, session.trainer.args.device)
    if not math.isfinite(scores[LOSS]):
        advice = "lower `lr` or `angle_lr`" if step else "the base model itself gives it"
        raise DivergedError(f"step {step}", "a finite evaluation loss", str(scores[LOSS]), advice)
    return scores
