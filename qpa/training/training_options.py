"""What a user may ask of a training: the options of train-generator, as the session sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpa.adapters.registry import KINDS
from qpa.circuits.gradients.estimator import GRADIENTS
from qpa.circuits.sources.sampling_options import SamplingOptions
from qpa.circuits.sources.source import SOURCES
from qpa.errors import OptionError
from qpa.generators.generator import GENERATORS
from qpa.models.base_model import DEVICES
from qpa.models.quantization import QUANTIZATIONS
from qpa.pipeline.options import check_options, defaults_by_name, option
from qpa.training.data.data_options import DataOptions
from qpa.training.objectives.objective import OBJECTIVES
from qpa.training.schedules import SCHEDULES
from qpa.training.trackers import TRACKERS

if TYPE_CHECKING:
    import torch

MAX_NUMBER = 1e6
"""A number above any sensible learning rate, number of epochs or warm-up, and within float32."""

_STEPS, _PRECISION, _WATCH = "Steps and rates", "Precision and memory", "Evaluation, checkpoints, trackers"


@dataclass(frozen=True, slots=True)
class TrainingOptions(DataOptions, SamplingOptions):
    """The options of a training.

    Args:    data .. packing: see `DataOptions`.
             max_steps: optimizer steps; None means `epochs` passes over the data.
             batch_size, grad_accum: rows per micro-batch, micro-batches per step.
             objective: what is trained for, a name in `qpa.training.objectives.objective.OBJECTIVES`.
             beta: of the objective "dpo": how strongly the model is held to its start.
             source: what runs the circuits, a name in `qpa.circuits.sources.source.SOURCES`.
             gradient: how gradients are pulled back through it, a name in
             `qpa.circuits.gradients.estimator.GRADIENTS`; None is "adjoint" where the source is simulated,
             and else "surrogate".
             shots, backend, session, yes: see `SamplingOptions`.
             lr: peak learning rate of the decoders; None means what suits the generator.
             angle_lr: of the angles; None means the decoders'.
             schedule: how both go on from their peak, a name in `qpa.training.schedules.SCHEDULES`.
             warmup: steps of linear warm-up, or below 1 the share of all steps.
             weight_decay: of AdamW, for the decoders.
             max_grad_norm: the norm to which the gradient of the generator's own numbers is clipped, 0 for
             not. None: it is not clipped, but the adapter's is, to 1, as transformers' trainer does.
             bf16, fp16: autocast, base weights in the checkpoint's own dtype. fp16 needs a CUDA device, and
             scales the loss so that small gradients do not vanish.
             gradient_checkpointing: compute activations again in the backward pass.
             quantize: what the base's weights are rounded to for the training, a name in
             `qpa.models.quantization.QUANTIZATIONS`; None for not.
             device: "auto", "cpu" or "cuda".
             basis: where the plan's basis is now; None for where it was planned with.
             trust_remote_code: let the model's own Python code run.
             eval_steps: steps between evaluations during the training; None for none.
             keep_best: freeze the generator of the best evaluation instead of the last.
             early_stopping: how many evaluations in a row may be no better than the best before the training
             stops, and the best is frozen.
             log_steps: steps between lines of metrics.jsonl.
             save_steps, keep_checkpoints: steps between checkpoints, and how many of them are kept, besides
             the best.
             report_to: trackers that get the lines of metrics.jsonl, names in
             `qpa.training.trackers.TRACKERS`.
             resume: continue from the newest checkpoint; the result is the same, to the bit.
    """

    max_steps: int | None = option(
        None, help="Optimizer steps, instead of `epochs`.", at_least=1, panel=_STEPS
    )
    epochs: float = option(1.0, help="Passes over the data.", above=0, at_most=MAX_NUMBER, panel=_STEPS)
    batch_size: int = option(8, help="Rows per micro-batch.", at_least=1, panel=_STEPS)
    grad_accum: int = option(1, help="Micro-batches per optimizer step.", at_least=1, panel=_STEPS)
    objective: str = option("sft", help="What is trained for: {choices}.", choices=OBJECTIVES)
    beta: float = option(
        0.1,
        help="Of `objective` dpo: how strongly the model is held to its start.",
        above=0,
        at_most=MAX_NUMBER,
    )
    source: str = option(
        "exact", help="What runs the circuits: {choices}.", choices=SOURCES, panel=SamplingOptions.panel
    )
    gradient: str | None = option(
        None,
        help="How gradients are pulled back through `source`: {choices}.",
        choices=GRADIENTS,
        shown_default="adjoint for exact, surrogate for the others",
        panel=SamplingOptions.panel,
    )
    lr: float | None = option(
        None,
        help="Peak learning rate of the decoder.",
        above=0,
        at_most=MAX_NUMBER,
        shown_default=lambda: _default_rates(),
        panel=_STEPS,
    )
    angle_lr: float | None = option(
        None,
        help="Peak learning rate of the circuit's angles.",
        at_least=0,
        at_most=MAX_NUMBER,
        shown_default="as `lr`",
        panel=_STEPS,
    )
    schedule: str = option(
        "cosine",
        help="How learning rates go on from their peak: {choices}.",
        choices=SCHEDULES,
        choice_words=lambda name: SCHEDULES[name].words,
        panel=_STEPS,
    )
    warmup: float = option(
        0.05,
        help="Steps of linear warm-up; below 1, the share of all steps.",
        at_least=0,
        at_most=MAX_NUMBER,
        panel=_STEPS,
    )
    weight_decay: float = option(
        0.0,
        help="Weight decay of the decoder; angles have none.",
        at_least=0,
        at_most=MAX_NUMBER,
        panel=_STEPS,
    )
    max_grad_norm: float | None = option(
        None,
        help="Norm to which the gradient of angles and decoder is clipped; 0 for no clipping.",
        at_least=0,
        at_most=MAX_NUMBER,
        shown_default="the adapter's own gradient is clipped instead, to 1",
        panel=_STEPS,
    )
    bf16: bool = option(False, help="bfloat16 autocast; the adapter stays float32.", panel=_PRECISION)
    fp16: bool = option(
        False,
        help="float16 autocast with a scaled loss, on a CUDA device; the adapter stays float32.",
        panel=_PRECISION,
    )
    quantize: str | None = option(
        None,
        help="Round the base's weights for the training: {choices}.",
        choices=QUANTIZATIONS,
        choice_words=lambda name: QUANTIZATIONS[name].words,
        shown_default="as they are",
        panel=_PRECISION,
    )
    gradient_checkpointing: bool = option(
        False,
        help="Compute activations again in the backward pass: less memory, more time.",
        provenance=False,
        panel=_PRECISION,
    )
    device: str = option("auto", help="Device to run on: {choices}.", choices=DEVICES, panel=_PRECISION)
    basis: str | None = option(
        None,
        help="Where the basis of the plan is now.",
        is_path=True,
        shown_default="where it was planned with",
        provenance=False,
        in_file=False,
    )
    eval_steps: int | None = option(
        None,
        help="Steps between evaluations during the training.",
        at_least=1,
        shown_default="before and after it only",
        panel=_WATCH,
    )
    keep_best: bool = option(
        False, help="Freeze the best of all evaluations instead of the last.", panel=_WATCH
    )
    early_stopping: int | None = option(
        None,
        help="Stop after so many evaluations in a row that are no better, and freeze the best.",
        at_least=1,
        shown_default="never",
        panel=_WATCH,
    )
    log_steps: int = option(
        10, help="Steps between lines of metrics.jsonl.", at_least=1, provenance=False, panel=_WATCH
    )
    save_steps: int = option(
        100, help="Steps between checkpoints.", at_least=1, provenance=False, panel=_WATCH
    )
    keep_checkpoints: int = option(
        2,
        help="How many checkpoints are kept, besides the best.",
        at_least=1,
        provenance=False,
        panel=_WATCH,
    )
    report_to: tuple[str, ...] | None = option(
        None,
        help="Trackers that get the lines of metrics.jsonl, separated by commas: {choices}.",
        choices=TRACKERS,
        shown_default="none",
        provenance=False,
        panel=_WATCH,
    )
    resume: bool = option(
        False, help="Continue from the newest checkpoint.", provenance=False, in_file=False, panel=_WATCH
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    @property
    def freezes_best(self) -> bool:
        """Return whether the generator of the best evaluation is kept."""
        return self.keep_best or self.early_stopping is not None

    @property
    def autocast_to(self) -> torch.dtype | None:
        """Return the type of autocast, None for none."""
        import torch

        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def check(self) -> None:
        """Check the options, alone and beside each other, before anything is loaded.

        Raises:  OptionError: one is out of range, two contradict each other, or this machine lacks what one
                 needs.
        """
        check_options(self)
        if self.bf16 and self.fp16:
            raise OptionError("fp16", "one of `bf16` and `fp16`", "both", "leave one out")
        for name, value in (("keep_best", self.keep_best), ("early_stopping", self.early_stopping)):
            if value and self.eval_steps is None:
                advice = "say how often: `eval_steps`"
                raise OptionError(name, "evaluations during the training", "none", advice)


def _default_rates() -> str:
    """Return the default learning rates: the first generator's, those of kinds of adapters, the others'."""
    words = {name: GENERATORS[name].defaults.get("lr") for name in GENERATORS}
    own = {name: float(rate) for name, rate in words.items() if rate is not None}
    of_kinds = {name: rate for name in KINDS if (rate := KINDS[name].rate) is not None}
    first = next(iter(own))
    return defaults_by_name({first: own.pop(first), **of_kinds, **own})
