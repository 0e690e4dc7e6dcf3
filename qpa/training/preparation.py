"""What a training is made of: its data, the model with the adapter, the generator, and the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qpa.adapters.on_basis import basis_of
from qpa.adapters.parent import parent_of
from qpa.adapters.registry import KINDS
from qpa.circuits.execution import Execution
from qpa.circuits.sources.source import SOURCES, Cost
from qpa.documents import AdapterSpec, NativeCircuit, Provenance, WeightLayout
from qpa.errors import OptionError
from qpa.generators.generator import GENERATORS, make_generator
from qpa.models.base_model import load_tokenizer, torch_device
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.basis import Basis
from qpa.store.run_directory import CHECKPOINTS, older_digests
from qpa.training.base import check_machine, load_base
from qpa.training.circuits import cost_of_step, execution_of
from qpa.training.data.splits import Splits
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator
from qpa.training.objectives.objective import OBJECTIVES, Objective
from qpa.training.processes import ALONE, Processes
from qpa.training.row_order import ContextOrder, even_out, order_contexts
from qpa.training.schedules import SCHEDULES
from qpa.training.tasks import Task, digest_of, read_tasks, together
from qpa.training.trackers import Trackers
from qpa.training.training_options import TrainingOptions


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
    def older_digests(self) -> dict[str, str]:
        """Return what checkpoints of an older qpa call the documents of the plan, see `older_digests`."""
        return older_digests(self.context.files.path, self.context.documents)

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the run's checkpoints."""
        return self.context.files.path / CHECKPOINTS


def prepare(
    options: TrainingOptions, provenance: Provenance, context: PassContext, processes: Processes = ALONE
) -> Session:
    """Read the data, load the model, and put adapter, generator and trainer around it.

    Raises:  OptionError, ModelError, DataError: see `qpa.training.session.train`.
    """
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    options.check()
    device = torch_device(options.device)
    check_machine(options, device)
    execution = execution_of(options, context)
    step_cost = cost_of_step(execution, layout)
    basis = None if options.resume else basis_of(spec, options.basis)
    context.progress("loading the base model and the data", 0, 1)
    read = _read_data(options, context)
    adapted = _adapt(
        load_base(options, spec, device, processes), read, execution, options, context, processes
    )
    splits = read.objective.with_reference(adapted.model, read.splits, context.progress)
    n_steps = _count_steps(options, len(splits.training), read.order)
    options.check_consent(execution.source, step_cost.times(n_steps + 1))  # once at the start
    trainer = _make_trainer(adapted, read, splits, n_steps, options, context, processes)
    trackers = (options.report_to or ()) if processes.is_first else ()
    return Session(
        options=options,
        provenance=provenance,
        context=context,
        objective=read.objective,
        splits=splits,
        tasks=read.tasks,
        data_digest=digest_of(splits, read.tasks),
        basis=basis,
        adapted=adapted,
        trainer=trainer,
        trackers=Trackers(trackers, context.files.path, trainer),
        n_steps=n_steps,
        step_cost=step_cost,
        is_paid=execution.source.is_paid,
        processes=processes,
    )


class _Data(NamedTuple):
    """The data as it is read: the rows, and by context, and their order where every step is of one."""

    objective: Objective
    splits: Splits
    tasks: tuple[Task, ...]
    order: ContextOrder | None


def _read_data(options: TrainingOptions, context: PassContext) -> _Data:
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    tokenizer = load_tokenizer(spec.base, trust_remote_code=options.trust_remote_code)
    objective = OBJECTIVES[options.objective](options, tokenizer)
    tasks = read_tasks(options, tokenizer, layout.features.contexts, context.seed_for("split"))
    splits = together(tasks) if tasks else objective.rows(context.seed_for("split"))
    return _Data(objective, splits, tasks, _order_of(tasks, options, context))


def _adapt(
    model: Any,
    read: _Data,
    execution: Execution,
    options: TrainingOptions,
    context: PassContext,
    processes: Processes,
) -> GeneratedAdapter:
    """Put the adapter into the base model, and its generator into an optimizer."""
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    _check_length(options.max_length, spec, model.config)
    generator = make_generator(layout, layout.seed, execution=execution)
    lr, angle_lr = learning_rates(options, spec, layout)
    return attach_generator(
        model,
        spec,
        generator,
        parent_of(spec, context),
        lr=lr,
        angle_lr=angle_lr,
        weight_decay=options.weight_decay,
        processes=processes,
        max_grad_norm=options.max_grad_norm,
        context_of_step=read.order.context_of_step if read.order else None,
    )


def _make_trainer(
    adapted: GeneratedAdapter,
    read: _Data,
    splits: Splits,
    n_steps: int,
    options: TrainingOptions,
    context: PassContext,
    processes: Processes,
) -> Any:
    """Return the objective's trainer, which takes the rows in their order."""
    lr, _ = learning_rates(options, context.document(AdapterSpec), context.document(WeightLayout))
    trainer = read.objective.trainer(
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
    if read.order is None:
        even_out(trainer, processes.n)
    else:
        order_contexts(trainer, read.order)
    return trainer


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
