"""A planned run under a trainer or loop of the user's own: one call from the plan to model and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qpa.adapters.on_basis import basis_of
from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import OptionError
from qpa.generators.generator import GENERATORS, make_generator
from qpa.models.base_model import load_model, torch_device
from qpa.store.run_directory import RunDirectory
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator
from qpa.training.on_basis import take_directions


def attach_run(
    run: str | Path,
    batches: Sequence[dict[str, Any]],
    *,
    lr: float | None = None,
    angle_lr: float | None = None,
    basis: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> GeneratedAdapter:
    """Load the base model of a planned run with its adapter, and the optimizer of the adapter's generator.

    The circuits are simulated exactly. The run itself is only read. Where it has contexts, the adapter is
    that of the first until `optimizer.use_context` chooses another.

    Args:    run: directory that qpa plan made.
             batches: a few of the training's, eight in qpa train, as arguments of the model with their labels
             and on its device: their gradient tells the directions, or which of a basis. Generators without
             directions read none. Several processes that train together all give the same batches.
             lr, angle_lr: as of `GeneratedAdapterOptimizer`; None stands for the generator's own.
             basis: where the basis of the plan is now, if it is no longer where it was.
             device: "auto", "cpu" or "cuda".
             trust_remote_code: the user allows the model's own Python code to run.
    Returns: `model`, of PEFT where PEFT has this kind of adapter, and `optimizer`.
    Raises:  DocumentError: it is no run, or a damaged one, or its basis is not where it was.
             ModelError: the base model is not there, or not the one that was planned for.
             OptionError: there is no such device, or the contexts are prompts.
             DivergedError: the gradient of the batches is not finite.
    Source:  ours.
    """
    directory = RunDirectory.open(Path(run))
    spec, layout = directory.read(AdapterSpec), directory.read(WeightLayout)
    if layout.features.contexts is not None and layout.features.contexts.kind == "prompt":
        expected = "task under a trainer of your own, which tells the prompts nobody"
        raise OptionError("context_kind", expected, "prompt")
    model = load_model(spec.base, keep_dtype=False, trust_remote_code=trust_remote_code)
    shared, kind = basis_of(spec, None if basis is None else str(basis)), GENERATORS[layout.generator]
    lr = kind.rate(spec) if lr is None else lr
    angle_lr = lr * kind.angle_ratio if angle_lr is None else angle_lr
    generator = make_generator(layout, layout.seed)
    attached = attach_generator(model.to(torch_device(device)), spec, generator, lr=lr, angle_lr=angle_lr)

    def loss(batch: dict[str, Any]) -> Tensor:
        found: Tensor = attached.model(**batch).loss
        return found

    if shared is None:
        attached.calibrate(spec, loss, batches)
    else:
        take_directions(attached, shared, spec, loss, batches)
    return attached
