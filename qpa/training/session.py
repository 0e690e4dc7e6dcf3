"""One training, from top to bottom: prepare, calibrate, fit, score, record.

`train` is the whole of it. What it needs is made in `prepare` and nowhere else; what it leaves is written in
`_start_log`, in the callback of the trainer and in `_record`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PrinterCallback

from qpa.adapters.attach import adapter_parameters, set_adapter, wrap_model
from qpa.adapters.on_basis import basis_of
from qpa.adapters.parameter_view import AdapterParameter
from qpa.adapters.parent import parent_of
from qpa.adapters.registry import KINDS
from qpa.circuits.sources.source import SOURCES, Cost
from qpa.compat.transformers_ import keep_weights_on_resume
from qpa.documents import (
    AdapterSpec,
    Checkpoint,
    ChosenBank,
    NativeCircuit,
    Provenance,
    Score,
    TrainedContext,
    TrainedGenerator,
    TrainingResult,
    WeightLayout,
)
from qpa.documents.trained_generator import INITIAL_PREFIX
from qpa.errors import DivergedError, OptionError, OtherDataError, SourceError
from qpa.generators.fast_weights import contexts_of
from qpa.generators.generator import GENERATORS, make_generator
from qpa.models.base_model import load_model, load_tokenizer, torch_device
from qpa.models.probe import record_probe
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.basis import Basis
from qpa.store.atomic_files import remove_leftovers
from qpa.store.run_directory import CHECKPOINTS, METRICS
from qpa.termination import deferring_sigterm
from qpa.training.base import check_machine, load_base
from qpa.training.calibration import choose_rows
from qpa.training.checkpoints import (
    best_evaluation,
    checkpoint_path,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    restore_optimizer,
)
from qpa.training.circuits import cost_of_step, execution_of, files_of_circuit, gradient_name
from qpa.training.contexts import set_contexts
from qpa.training.data.splits import Splits
from qpa.training.evaluation import count_row_tokens
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator
from qpa.training.generator_callback import GeneratorCallback, is_patience_over
from qpa.training.objectives.objective import LOSS, OBJECTIVES, PERPLEXITY, Objective, as_metrics
from qpa.training.on_basis import settle, take_directions
from qpa.training.processes import ALONE, Processes, naming_lost_processes
from qpa.training.row_order import ContextOrder, even_out, order_contexts
from qpa.training.schedules import SCHEDULES
from qpa.training.tasks import Task, digest_of, read_tasks, score_name, score_tasks, together
from qpa.training.trackers import Trackers
from qpa.training.training_log import TrainingLog
from qpa.training.training_options import TrainingOptions

Resumed = tuple[Path, Checkpoint]
"""A checkpoint's directory and document."""


@dataclass(frozen=True)
class Session:
    """Everything that one training is made of.

    Args:    options, provenance, context: of the pass.
             splits: the tokenised splits; data_digest: the digest of both.
             tasks: the same rows by context; () where the generator has none.
             basis: where the directions are taken from; None where they are read off the gradient, and for a
             training that goes on, which has them.
             adapted: the model with its adapter, and the optimizer with the generator.
             trainer: of transformers, which has all of these.
             trackers: what draws the lines of metrics.jsonl.
             n_steps: the number of optimizer steps of the whole training, unless it stops early.
             step_cost: what one of these steps costs on the circuits' source.
             is_paid: whether that may cost money; every step is saved then.
             processes: that train together.
    """

    options: TrainingOptions
    provenance: Provenance
    context: PassContext
    objective: Objective
    splits: Splits
    tasks: tuple[Task, ...]
    data_digest: str
    basis: Basis | None
    adapted: GeneratedAdapter
    trainer: Any
    trackers: Trackers
    n_steps: int
    step_cost: Cost
    is_paid: bool
    processes: Processes

    @property
    def saved_as(self) -> Provenance:
        """Return the provenance of a checkpoint: it also names the native circuit, where that is run."""
        if not SOURCES[self.options.source].runs_native:
            return self.provenance
        parents = (*self.provenance.parents, self.context.document(NativeCircuit).digest)
        return self.provenance.model_copy(update={"parents": parents})

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the run's checkpoints."""
        return self.context.files.path / CHECKPOINTS


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


def prepare(
    options: TrainingOptions, provenance: Provenance, context: PassContext, processes: Processes = ALONE
) -> Session:
    """Read the data, load the model, and put adapter, generator and trainer around it.

    Raises:  OptionError, ModelError, DataError: see `train`.
    """
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    options.check()
    device, trust = torch_device(options.device), options.trust_remote_code
    check_machine(options, device)
    execution = execution_of(options, context)
    step_cost = cost_of_step(execution, layout)
    basis = None if options.resume else basis_of(spec, options.basis)
    context.progress("loading the base model and the data", 0, 1)
    tokenizer = load_tokenizer(spec.base, trust_remote_code=trust)
    objective = OBJECTIVES[options.objective](options, tokenizer)
    tasks = read_tasks(options, tokenizer, layout.features.contexts, context.seed_for("split"))
    splits = together(tasks) if tasks else objective.rows(context.seed_for("split"))
    order = _order_of(tasks, options, context)
    model = load_base(options, spec, device, processes)
    _check_length(options.max_length, spec, model.config)
    generator = make_generator(layout, layout.seed, execution=execution)
    lr, angle_lr = learning_rates(options, spec, layout)
    adapted = attach_generator(
        model,
        spec,
        generator,
        parent_of(spec, context),
        lr=lr,
        angle_lr=angle_lr,
        weight_decay=options.weight_decay,
        processes=processes,
        max_grad_norm=options.max_grad_norm,
        context_of_step=order.context_of_step if order else None,
    )
    splits = objective.with_reference(adapted.model, splits, context.progress)
    n_steps = _count_steps(options, len(splits.training), order)
    options.check_consent(execution.source, step_cost.times(n_steps + 1))  # once at the start
    trainer = objective.trainer(
        adapted.model,
        adapted.optimizer,
        splits,
        output=context.files.path / CHECKPOINTS,
        seed=context.seed_for("data order"),
        bf16=options.bf16,
        fp16=options.fp16,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum // processes.n,
        learning_rate=lr,
        # The optimizer clips the generator's gradient instead, where that is asked for.
        max_grad_norm=1.0 if options.max_grad_norm is None else 0.0,
        lr_scheduler_type=SCHEDULES[options.schedule].scheduler,
        warmup_steps=_count_warmup(options, n_steps),
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    if order is None:
        even_out(trainer, processes.n)
    else:
        order_contexts(trainer, order)
    return Session(
        options=options,
        provenance=provenance,
        context=context,
        objective=objective,
        splits=splits,
        tasks=tasks,
        data_digest=digest_of(splits, tasks),
        basis=basis,
        adapted=adapted,
        trainer=trainer,
        trackers=Trackers(
            (options.report_to or ()) if processes.is_first else (), context.files.path, trainer
        ),
        n_steps=n_steps,
        step_cost=step_cost,
        is_paid=execution.source.is_paid,
        processes=processes,
    )


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
    restore_optimizer(path, session.adapted.optimizer, read_checkpoint(path, session.saved_as, "train again"))
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


def adapters_of(session: Session) -> list[dict[str, Tensor]]:
    """Return the adapter of each context, float32 on the CPU, by path; or the only one there is."""
    adapters = []
    for index in range(max(1, len(session.tasks))):
        if session.tasks:
            session.adapted.optimizer.use_context(index)
        parameters = session.adapted.parameters.items()
        adapters.append({path: one.detach().cpu().clone().contiguous() for path, one in parameters})
    return adapters


def record(
    session: Session,
    adapters: Sequence[Mapping[str, Tensor]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    n_steps: int,
    frozen_step: int,
    bank: ChosenBank | None,
) -> TrainedGenerator:
    """Leave generator, adapters and probes of the adapted model in the files, and return their document.

    The model is on the CPU and in float32 afterwards, unless its weights were quantised.

    Args:    adapters: of each context, or the only one.
             before, after: the scores of the base model and of what is frozen.
             n_steps: the steps that were taken.
             frozen_step: the step after which the generator was as it is now.
             bank: whose directions it has.
    """
    adapted, splits, options = session.adapted, session.splits, session.options
    model, parameters = _whole_model(session)
    model = model if options.quantize else model.cpu().float()
    arrays = {name: tensor.cpu().contiguous() for name, tensor in adapted.generator.state_dict().items()}
    arrays |= {f"{INITIAL_PREFIX}{path}": tensor for path, tensor in adapted.given.items()}
    put = session.context.put_tensors
    kept = []
    for adapter, rows in zip(adapters, [task.splits for task in session.tasks] or [splits], strict=True):
        set_adapter(parameters, adapter)
        probe = record_probe(model, torch.tensor(rows.evaluation[0]["input_ids"]))
        kept.append({"adapter": put(adapter), "probe": put(probe)})
    return TrainedGenerator(
        provenance=session.provenance,
        arrays=put(arrays),
        adapter=kept[0]["adapter"],
        probe=kept[0]["probe"],
        source=options.source,
        shots=options.shots,
        backend=options.backend,
        **files_of_circuit(options, session.context),
        gradient=gradient_name(options),
        result=TrainingResult(
            n_steps=n_steps,
            n_train_tokens=count_row_tokens(splits.training),
            n_eval_tokens=count_row_tokens(splits.evaluation),
            base_loss=before[LOSS],
            eval_loss=after[LOSS],
            data_digest=session.data_digest,
            frozen_step=frozen_step,
            objective=options.objective,
            scores=tuple(
                Score(name=name, base=before[name], adapted=after[name])
                for name in before
                if name not in (LOSS, PERPLEXITY)
            ),
            quantization=options.quantize,
        ),
        data=splits.summary,
        bank=bank,
        contexts=tuple(
            TrainedContext(
                name=task.name,
                **files,
                n_train_tokens=count_row_tokens(task.splits.training),
                n_eval_tokens=count_row_tokens(task.splits.evaluation),
                base_loss=before[score_name(task.name)],
                eval_loss=after[score_name(task.name)],
            )
            for task, files in zip(session.tasks, kept, strict=False)
        ),
    )


def _whole_model(session: Session) -> tuple[Any, Mapping[str, AdapterParameter]]:
    """Return the adapted model without autocast, and its adapter by path.

    Of a model whose processes hold a share each it is another copy.
    """
    if not session.processes.is_sharded:
        # A trainer puts its autocast around its model's own function, and leaves it there.
        session.trainer.accelerator.unwrap_model(session.trainer.model, keep_fp32_wrapper=False)
        return session.adapted.model, session.adapted.parameters
    options, context = session.options, session.context
    spec = context.document(AdapterSpec)
    trust = options.trust_remote_code
    base = load_model(spec.base, keep_dtype=options.autocast_to is not None, trust_remote_code=trust)
    model = wrap_model(base, spec)
    return model, adapter_parameters(model, spec)


def learning_rates(options: TrainingOptions, spec: AdapterSpec, layout: WeightLayout) -> tuple[float, float]:
    """Return the peak learning rates of decoders and angles."""
    kind = GENERATORS[layout.generator]
    lr = kind.rate(spec) if options.lr is None else options.lr
    return lr, lr * kind.angle_ratio if options.angle_lr is None else options.angle_lr


def _order_of(tasks: tuple[Task, ...], options: TrainingOptions, context: PassContext) -> ContextOrder | None:
    """Return the order of the rows where every step is of one context."""
    if not tasks:
        return None
    n_rows = [len(task.splits.training) for task in tasks]
    return ContextOrder(n_rows, options.batch_size * options.grad_accum, context.seed_for("data order"))


def _count_steps(options: TrainingOptions, n_rows: int, order: ContextOrder | None) -> int:
    """Return how many optimizer steps there will be."""
    n_per_epoch = math.ceil(math.ceil(n_rows / options.batch_size) / options.grad_accum)
    n_per_epoch = order.n_steps if order else n_per_epoch
    return options.max_steps or math.ceil(options.epochs * n_per_epoch)


def _count_warmup(options: TrainingOptions, n_steps: int) -> int:
    """Return the steps of the warm-up.

    A share of all steps is rounded down: the trainer would round it up, and train nothing in one step.
    """
    return int(options.warmup * n_steps if options.warmup < 1 else options.warmup)


def _check_length(max_length: int, spec: AdapterSpec, config: Any) -> None:
    """Check that the text fits the base model's context behind what the adapter puts before it."""
    n_before = KINDS[spec.method].n_positions(spec.rank)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length + n_before > limit:
        prefix = f" less the prefix's {n_before} tokens" if n_before else ""
        expected = f"at most {limit - n_before}, the base model's context{prefix}"
        raise OptionError("max_length", expected, str(max_length))


def _checkpoint_to_resume(session: Session) -> Resumed | None:
    """Return the newest checkpoint, where one is asked for.

    Raises:  CheckpointError: there is none, or it is not this training's.
    """
    if not session.options.resume:
        return None
    path, document = newest_checkpoint(session.checkpoints, session.saved_as)
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
