"""What a user may ask of a training: the options of train-generator, as the session sees them."""

from __future__ import annotations

from dataclasses import dataclass

from qpa.adapters.registry import KINDS
from qpa.circuits.gradients.estimator import GRADIENTS
from qpa.circuits.sources.sampling_options import SamplingOptions
from qpa.circuits.sources.source import SOURCES
from qpa.generators.generator import GENERATORS
from qpa.models.base_model import DEVICES
from qpa.pipeline.options import defaults_by_name, option
from qpa.training.data.data_options import DataOptions
from qpa.training.objectives.objective import OBJECTIVES

MAX_NUMBER = 1e6
"""A number above any sensible learning rate, number of epochs or warm-up, and within float32."""


@dataclass(frozen=True, slots=True)
class TrainingOptions(DataOptions, SamplingOptions):
    """The options of a training.

    Args:    data .. packing: see `DataOptions`.
             max_steps: optimizer steps; None means `epochs` passes over the data.
             batch_size, grad_accum: rows per micro-batch, micro-batches per step.
             objective: what is trained for, a name in `qpa.training.objectives.objective.OBJECTIVES`.
             source: what runs the circuits, a name in `qpa.circuits.sources.source.SOURCES`.
             gradient: how gradients are pulled back through it, a name in
             `qpa.circuits.gradients.estimator.GRADIENTS`; None is "adjoint" where the source is simulated,
             and else "surrogate".
             shots, backend, session, yes: see `SamplingOptions`.
             lr: peak learning rate of the decoders, with cosine decay to zero; None means what suits the
             generator.
             angle_lr: of the angles; None means the decoders'.
             warmup: steps of linear warm-up, or below 1 the share of all steps.
             bf16: bfloat16 autocast, base weights in the checkpoint's own dtype.
             device: "auto", "cpu" or "cuda".
             trust_remote_code: let the model's own Python code run.
             save_steps: steps between checkpoints.
             resume: continue from the newest checkpoint; the result is the same, to the bit.
    """

    max_steps: int | None = option(None, help="Optimizer steps, instead of `epochs`.", at_least=1)
    epochs: float = option(1.0, help="Passes over the data.", above=0, at_most=MAX_NUMBER)
    batch_size: int = option(8, help="Rows per micro-batch.", at_least=1)
    grad_accum: int = option(1, help="Micro-batches per optimizer step.", at_least=1)
    objective: str = option("sft", help="What is trained for: {choices}.", choices=OBJECTIVES)
    source: str = option("exact", help="What runs the circuits: {choices}.", choices=SOURCES)
    gradient: str | None = option(
        None,
        help="How gradients are pulled back through `source`: {choices}.",
        choices=GRADIENTS,
        shown_default="adjoint for exact, surrogate for the others",
    )
    lr: float | None = option(
        None,
        help="Peak learning rate of the decoder.",
        above=0,
        at_most=MAX_NUMBER,
        shown_default=lambda: _default_rates(),
    )
    angle_lr: float | None = option(
        None,
        help="Peak learning rate of the circuit's angles.",
        at_least=0,
        at_most=MAX_NUMBER,
        shown_default="as `lr`",
    )
    warmup: float = option(
        0.05,
        help="Steps of linear warm-up; below 1, the share of all steps.",
        at_least=0,
        at_most=MAX_NUMBER,
    )
    bf16: bool = option(False, help="bfloat16 autocast; the adapter stays float32.")
    device: str = option("auto", help="Device to run on: {choices}.", choices=DEVICES)
    save_steps: int = option(100, help="Steps between checkpoints.", at_least=1, provenance=False)
    resume: bool = option(False, help="Continue from the newest checkpoint.", provenance=False, in_file=False)
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )


def _default_rates() -> str:
    """Return the default learning rates: the first generator's, those of kinds of adapters, the others'."""
    words = {name: GENERATORS[name].defaults.get("lr") for name in GENERATORS}
    own = {name: float(rate) for name, rate in words.items() if rate is not None}
    of_kinds = {name: rate for name in KINDS if (rate := KINDS[name].rate) is not None}
    first = next(iter(own))
    return defaults_by_name({first: own.pop(first), **of_kinds, **own})
