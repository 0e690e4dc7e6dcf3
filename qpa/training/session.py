"""One training, from top to bottom: prepare, calibrate, fit, score, record.

`train` is the whole of it. What it needs is made in `prepare` and nowhere else; what it leaves is written in
`_start_log`, in the callback of the trainer and in `_record`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from qpa.adapters.attach import adapter_parameters, attach_adapter, set_adapter
from qpa.adapters.registry import KINDS
from qpa.circuits.circuit import files_as_run, load_circuit
from qpa.circuits.execution import Execution
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.surrogate import Surrogate
from qpa.circuits.sources.source import SOURCES, Cost
from qpa.compat.transformers_ import keep_weights_on_resume
from qpa.documents import (
    AdapterSpec,
    Attachment,
    Checkpoint,
    NativeCircuit,
    Provenance,
    TrainedGenerator,
    TrainingResult,
    WeightLayout,
)
from qpa.documents.trained_generator import INITIAL_PREFIX
from qpa.errors import DivergedError, OptionError, OtherDataError, SourceError
from qpa.generators.chunks import kept_rows
from qpa.generators.generator import GENERATORS, make_generator
from qpa.models.base_model import load_model, load_tokenizer, torch_device
from qpa.models.causality import check_causal
from qpa.models.probe import record_probe
from qpa.pipeline.pass_protocol import PassContext
from qpa.seeds import split_seed
from qpa.store.atomic_files import remove_leftovers
from qpa.store.run_directory import CHECKPOINTS, METRICS
from qpa.termination import deferring_sigterm
from qpa.training.calibration import choose_rows
from qpa.training.checkpoints import newest_checkpoint, remove_checkpoints, restore_optimizer
from qpa.training.data.splits import Splits
from qpa.training.evaluation import count_row_tokens, digest_of_rows
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator
from qpa.training.generator_callback import GeneratorCallback
from qpa.training.objectives.objective import LOSS, OBJECTIVES, Objective
from qpa.training.processes import ALONE, Processes, naming_lost_processes
from qpa.training.row_order import even_out
from qpa.training.training_log import TrainingLog
from qpa.training.training_options import TrainingOptions

Resumed = tuple[Path, Checkpoint]
"""A checkpoint's directory and document."""


@dataclass(frozen=True)
class Session:
    """Everything that one training is made of.

    Args:    options, provenance, context: of the pass.
             splits: the tokenised splits; data_digest: the digest of both.
             adapted: the model with its adapter, and the optimizer with the generator.
             trainer: of transformers, which has all of these.
             n_steps: the number of optimizer steps of the whole training.
             step_cost: what one of these steps costs on the circuits' source.
             is_paid: whether that may cost money; every step is saved then.
             processes: that train together.
    """

    options: TrainingOptions
    provenance: Provenance
    context: PassContext
    objective: Objective
    splits: Splits
    data_digest: str
    adapted: GeneratedAdapter
    trainer: Any
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
    with session.adapted.model.disable_adapter():
        before = score(session, "evaluating the base model", step=0)
    log = _start_log(session, resumed, before) if session.processes.is_first else None
    if resumed is None:
        calibrate(session)
    fit(session, resumed, log)
    after = score(session, "evaluating the adapted model", step=session.n_steps)
    session.adapted.optimizer.check_same("at the end")
    if log is None:
        return None
    log.write(session.n_steps, _as_metrics(after))
    return record(session, before, after)


def prepare(
    options: TrainingOptions, provenance: Provenance, context: PassContext, processes: Processes = ALONE
) -> Session:
    """Read the data, load the model, and put adapter, generator and trainer around it.

    Raises:  OptionError, ModelError, DataError: see `train`.
    """
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    device, trust = torch_device(options.device), options.trust_remote_code
    execution = execution_of(options, context)
    context.progress("loading the base model and the data", 0, 1)
    tokenizer = load_tokenizer(spec.base, trust_remote_code=trust)
    objective = OBJECTIVES[options.objective](options, tokenizer)
    splits = objective.rows(context.seed_for("split"))
    n_shards = processes.n if processes.is_sharded else 1
    model = load_model(spec.base, keep_dtype=options.bf16, trust_remote_code=trust, n_shards=n_shards)
    model = model if processes.is_sharded else model.to(device)
    check_causal(model, spec.base.name_or_path, bf16=options.bf16)
    _check_length(options.max_length, spec, model.config)
    generator = make_generator(layout, layout.seed, execution=execution)
    lr, angle_lr = learning_rates(options, spec, layout)
    adapted = attach_generator(model, spec, generator, lr=lr, angle_lr=angle_lr, processes=processes)
    n_steps = _count_steps(options, len(splits.training))
    step_cost = cost_of_step(execution, layout)
    options.check_consent(execution.source, step_cost.times(n_steps + 1))  # once at the start
    trainer = objective.trainer(
        adapted.model,
        adapted.optimizer,
        splits,
        output=context.files.path / CHECKPOINTS,
        seed=context.seed_for("data order"),
        bf16=options.bf16,
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum // processes.n,
        learning_rate=lr,
        warmup_steps=_count_warmup(options, n_steps),
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    even_out(trainer, processes.n)
    return Session(
        options=options,
        provenance=provenance,
        context=context,
        objective=objective,
        splits=splits,
        data_digest=digest_of_rows(splits.training, splits.evaluation),
        adapted=adapted,
        trainer=trainer,
        n_steps=n_steps,
        step_cost=step_cost,
        is_paid=execution.source.is_paid,
        processes=processes,
    )


def calibrate(session: Session) -> None:
    """Give the generator's spectra the directions of the gradient of a few training batches."""
    context, rows = session.context, session.splits.training
    chosen = choose_rows(len(rows), session.options.batch_size, context.seed_for("calibration"))
    context.progress("reading the gradient", 0, 1)
    session.adapted.calibrate(
        context.document(AdapterSpec),
        lambda batch: session.objective.calibration_loss(session.adapted.model, batch),
        [[rows[index] for index in batch] for batch in chosen],
    )


def fit(session: Session, resumed: Resumed | None, log: TrainingLog | None) -> None:
    """Take all optimizer steps, or those that are left after a checkpoint.

    Raises:  DivergedError: a gradient is not finite; the error names the last good checkpoint.
             SourceError: what runs the circuits fails; likewise.
             Terminated: SIGTERM came, and the step under way is saved.
    """
    if resumed is not None and resumed[1].step >= session.n_steps:
        restore_optimizer(resumed[0], session.adapted.optimizer, resumed[1])
        return
    with deferring_sigterm() as asks_to_end:
        _take_steps(session, resumed, log, asks_to_end)


def _take_steps(
    session: Session, resumed: Resumed | None, log: TrainingLog | None, asks_to_end: Callable[[], bool]
) -> None:
    callback = GeneratorCallback(
        peft_model=session.adapted.model,
        optimizer=session.adapted.optimizer,
        log=log,
        progress=session.context.progress,
        root=session.checkpoints,
        save_steps=1 if session.is_paid else session.options.save_steps,
        seed=session.context.seed_for("steps"),
        provenance=session.saved_as,
        data_digest=session.data_digest,
        asks_to_end=asks_to_end,
        processes=session.processes,
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


def score(session: Session, description: str, *, step: int) -> Mapping[str, float]:
    """Return the objective's scores of the model as it is, on the evaluation split.

    Raises:  DivergedError: the loss is not finite.
    """
    scores = session.objective.scores(
        session.adapted.model, session.splits.evaluation, session.context.progress, description
    )
    if not math.isfinite(scores[LOSS]):
        advice = "lower `lr` or `angle_lr`" if step else "the base model itself gives it"
        raise DivergedError(f"step {step}", "a finite evaluation loss", str(scores[LOSS]), advice)
    return scores


def record(session: Session, before: Mapping[str, float], after: Mapping[str, float]) -> TrainedGenerator:
    """Leave generator, adapter and a probe of the adapted model in the files, and return their document.

    The model is on the CPU and in float32 afterwards.
    """
    adapted, splits, options = session.adapted, session.splits, session.options
    model = _whole_model(session).cpu().float()
    arrays = {name: tensor.cpu().contiguous() for name, tensor in adapted.generator.state_dict().items()}
    arrays |= {f"{INITIAL_PREFIX}{path}": tensor for path, tensor in adapted.from_base.items()}
    adapter = {path: parameter.detach().cpu().contiguous() for path, parameter in adapted.parameters.items()}
    probe = record_probe(model, torch.tensor(splits.evaluation[0]["input_ids"]))
    put = session.context.put_tensors
    return TrainedGenerator(
        provenance=session.provenance,
        arrays=put(arrays),
        adapter=put(adapter),
        probe=put(probe),
        source=options.source,
        shots=options.shots,
        backend=options.backend,
        **_files_as_run(options, session.context),
        gradient=gradient_name(options),
        result=TrainingResult(
            n_steps=session.n_steps,
            n_train_tokens=count_row_tokens(splits.training),
            n_eval_tokens=count_row_tokens(splits.evaluation),
            base_loss=before[LOSS],
            eval_loss=after[LOSS],
            data_digest=session.data_digest,
        ),
        data=splits.summary,
    )


def _whole_model(session: Session) -> Any:
    """Return the adapted model; of one whose processes hold a share each, another copy."""
    if not session.processes.is_sharded:
        return session.adapted.model
    options, context = session.options, session.context
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    trust = options.trust_remote_code
    base = load_model(spec.base, keep_dtype=options.bf16, trust_remote_code=trust)
    model = attach_adapter(base, spec, kept_rows(layout))
    values = {path: parameter.detach() for path, parameter in session.adapted.parameters.items()}
    set_adapter(adapter_parameters(model, spec), values)
    return model


def learning_rates(options: TrainingOptions, spec: AdapterSpec, layout: WeightLayout) -> tuple[float, float]:
    """Return the peak learning rates of decoders and angles."""
    kind = GENERATORS[layout.generator]
    lr = kind.rate(spec) if options.lr is None else options.lr
    return lr, lr * kind.angle_ratio if options.angle_lr is None else options.angle_lr


def _count_steps(options: TrainingOptions, n_rows: int) -> int:
    """Return how many optimizer steps there will be."""
    n_per_epoch = math.ceil(math.ceil(n_rows / options.batch_size) / options.grad_accum)
    return options.max_steps or math.ceil(options.epochs * n_per_epoch)


def _count_warmup(options: TrainingOptions, n_steps: int) -> int:
    """Return the steps of the warm-up.

    A share of all steps is rounded down: the trainer would round it up, and train nothing in one step.
    """
    return int(options.warmup * n_steps if options.warmup < 1 else options.warmup)


def gradient_name(options: TrainingOptions) -> str:
    """Return the name of the estimator of gradients."""
    simulated = SOURCES[options.source].is_differentiable
    return options.gradient or (Adjoint.name if simulated else Surrogate.name)


def execution_of(options: TrainingOptions, context: PassContext) -> Execution:
    """Return the circuit of a plan with the source that runs it and the estimator of its gradients.

    Raises:  OptionError: source and estimator do not go together, or the source cannot use the options.
             DocumentError, PipelineError: the circuit cannot be read.
    """
    seed = context.seed_for("circuits")
    source = options.make_source(options.source, split_seed(seed, f"source {options.source}"))
    circuit = load_circuit(context, native=source.runs_native)
    return Execution.of(circuit, source, gradient_name(options), seed)


def _files_as_run(options: TrainingOptions, context: PassContext) -> dict[str, Attachment | None]:
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


def _start_log(session: Session, resumed: Resumed | None, before: Mapping[str, float]) -> TrainingLog:
    """Start metrics.jsonl over, and forget what an earlier training gave; or cut it at the checkpoint."""
    files = session.context.files
    if resumed is not None:
        remove_leftovers(session.checkpoints)
        return TrainingLog(files.path / METRICS, resumed[1].step)
    files.drop_from(TrainedGenerator)
    remove_checkpoints(session.checkpoints)
    log = TrainingLog(files.path / METRICS)
    cost = session.step_cost
    costs = {"step_circuits": cost.n_circuits, "step_executions": cost.n_executions, "step_jobs": cost.n_jobs}
    log.write(0, {**_as_metrics(before), **costs})
    return log


def _as_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in scores.items()}
