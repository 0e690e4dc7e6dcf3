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
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, final

from qpa.documents import AdapterSpec, Document, LogicalCircuit, TrainedGenerator, WeightLayout
from qpa.errors import OptionError
from qpa.pipeline.options import check_options
from qpa.pipeline.pass_protocol import PassContext
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
        """
        from qpa.training.session import train

        _check_alone()
        check_options(self)
        return train(self, context.provenance(self, source), context)


def _check_alone() -> None:
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes != "1":
        advice = "for several, use qpa.training.optimizer.GeneratedAdapterOptimizer in a script of your own"
        raise OptionError("qpa train", "one process", f"WORLD_SIZE={n_processes}", advice)
