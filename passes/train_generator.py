"""train-generator: the only pass that touches base weights and data.

Rules:
1. The base model carries an ordinary adapter (`qpa.adapters.attach`) and trains under the trainer of the
   objective (`qpa.training.objectives.objective`); the generator lives in the optimizer
   (`qpa.training.optimizer`).
2. Delta W is exactly zero before the first step: the plan's seed draws lora_A and the angles, lora_B and
   the decoders' last layers are zero. (A prefix alone changes the model from the start.) Directions of
   spectra are those of the gradient of a few batches of the training split, read before the first step
   (`qpa.training.calibration`).
3. Everything random during training is a function of the training seed and the step, so a resumed
   training continues with the same bits.
4. What an earlier training of the run gave is forgotten before the first step, and not before the data, the
   model and the options are known to be right.
5. Several processes train together (`qpa.training.processes`): the provenance counts the micro-batches of
   all of them in `grad_accum`, so the options are those of one process that takes the same steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.documents import AdapterSpec, Document, LogicalCircuit, TrainedGenerator, WeightLayout
from qpa.pipeline.options import check_options
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.stages import STAGES
from qpa.store.run_directory import RunDirectory
from qpa.training.processes import call_followers, join, n_started, tasks
from qpa.training.training_options import TrainingOptions


@final
@dataclass(frozen=True, slots=True)
class TrainGenerator(TrainingOptions):
    """Train angles and decoders through the base model; the options are those of `TrainingOptions`.

    Source:  ours.
    """

    name: ClassVar[str] = "train-generator"
    consumes: ClassVar[type] = LogicalCircuit
    requires: ClassVar[tuple[type[Document], ...]] = (AdapterSpec, WeightLayout)
    produces: ClassVar[type[Document]] = TrainedGenerator
    section: ClassVar[str] = "train"

    def run(self, source: LogicalCircuit, context: PassContext) -> TrainedGenerator:
        """Train; leave arrays, metrics.jsonl and checkpoints in the context's files.

        Raises:  OptionError, ModelError, DataError: something that the training needs is wrong.
                 DivergedError: a gradient is not finite; the last checkpoint stays.
                 CheckpointError: there is none to resume, it is cut short, or other options wrote it.
                 ProcessError: one of several processes has ended, or they do not agree.
        """
        check_options(self)
        newest = type(context.documents[-1]).kind
        call_followers(
            {"options": asdict(self), "run": str(context.files.path), "seed": context.seed, "newest": newest}
        )
        trained = self.take_part(source, context)
        assert trained is not None
        return trained

    def take_part(self, source: LogicalCircuit, context: PassContext) -> TrainedGenerator | None:
        """Train as one of the processes that were started; see `qpa.training.session.train`."""
        from qpa.models.base_model import torch_device
        from qpa.training.session import train

        processes, as_one = join(torch_device(self.device)), self.as_one()
        return train(as_one, context.provenance(as_one, source), context, processes)

    def as_one(self, n_processes: int | None = None) -> TrainGenerator:
        """Return the options of one process that takes the same steps as several.

        Args:    n_processes: how many these are; None for those that were started.
        """
        return replace(self, grad_accum=self.grad_accum * (n_processes or n_started()))


def follow() -> None:
    """Take part in every training of the first process, until it is done.

    Raises:  QpaError: see `TrainGenerator.run`.
    """
    for task in tasks():
        last = next(stage.document for stage in STAGES if stage.document.kind == task["newest"])
        run = RunDirectory(Path(task["run"]))
        context = PassContext(task["seed"], run.files, run.read_through(last))
        _step_of(task["options"]).take_part(context.document(LogicalCircuit), context)


def _step_of(options: dict[str, Any]) -> TrainGenerator:
    """Return the pass whose options went through JSON, which knows no tuples."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return TrainGenerator(**values)
