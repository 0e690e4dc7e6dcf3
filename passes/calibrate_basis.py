"""calibrate-basis: the directions of a base model, once for all adapters of a shape.

Rules:
1. The gradient is read on batches of the training split as a training reads it, with its seeds: the basis of
   a training's own data, seed and batch size holds the directions of that training, bit for bit.
2. All directions of the adapter's rank are kept, of which a layout uses the first.
3. What an adapter starts as is kept too, since lora_A is drawn with torch: expansion needs numpy alone.

Source: ours; see `qpa.training.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

from qpa.documents import AdapterSpec, BasisTensor, Calibration, Document, SharedBasis
from qpa.documents.base import json_text
from qpa.errors import OptionError
from qpa.models.base_model import DEVICES
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.basis import INITIAL_PREFIX
from qpa.training.data.data_options import N_CALIBRATION_BATCHES, DataOptions

METHOD = "lora"


@final
@dataclass(frozen=True)
class CalibrateBasis(DataOptions):
    """Read the gradient of a base model on data.

    Args:    data .. packing: see `DataOptions`.
             batches, batch_size: how many rows are read.
             bf16: autocast, as in a training.
             device: "auto", "cpu" or "cuda".
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "calibrate-basis"
    consumes: ClassVar[type] = AdapterSpec
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = SharedBasis
    section: ClassVar[str] = "basis"

    batches: int = option(N_CALIBRATION_BATCHES, help="Batches of which the gradient is read.", at_least=1)
    batch_size: int = option(8, help="Rows per batch.", at_least=1)
    bf16: bool = option(False, help="bfloat16 autocast.")
    device: str = option("auto", help="Device to run on: {choices}.", choices=DEVICES)
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def run(self, source: AdapterSpec, context: PassContext) -> SharedBasis:
        """Read the gradient, and leave directions and initial values in the context's files.

        Raises:  OptionError: the adapter is no LoRA on layers of its own.
                 ModelError, DataError: something that this needs is wrong.
                 DivergedError: the gradient is not finite.
        """
        check_basis_of(source)
        from qpa.adapters.attach import initial_adapter
        from qpa.adapters.low_rank import lora_config
        from qpa.compat.peft_ import KEY_PREFIX

        bases, digest, n_batches = self._bases(source, context)
        first = initial_adapter(source)
        arrays = {path: basis.detach().cpu().float().contiguous() for path, basis in bases.items()}
        arrays |= {f"{INITIAL_PREFIX}{a.path}": first[a.path] for a, _ in source.pairs}
        factors = {a.path: "A" for a, _ in source.pairs}
        return SharedBasis(
            provenance=context.provenance(self, source),
            base=source.base,
            calibration=Calibration(data_digest=digest, n_batches=n_batches, batch_size=self.batch_size),
            scale=source.alpha / source.rank,
            lora_config=json_text(lora_config(source, source.rank, use_dora=False)).decode(),
            tensors=tuple(
                BasisTensor(
                    path=tensor.path,
                    key=KEY_PREFIX + tensor.path,
                    factor="A" if tensor.path in factors else "B",
                    shape=tensor.shape,
                )
                for tensor in source.tensors
            ),
            arrays=context.put_tensors(arrays),
        )

    def _bases(self, spec: AdapterSpec, context: PassContext) -> tuple[dict[str, Any], str, int]:
        """Return the directions by path, the digest of the data, and how many batches were read."""
        from qpa.adapters.attach import adapter_parameters, attach_adapter
        from qpa.models.base_model import load_tokenizer, torch_device
        from qpa.training.base import load_base
        from qpa.training.calibration import choose_rows, gradient_bases
        from qpa.training.objectives.objective import OBJECTIVES
        from qpa.training.processes import ALONE
        from qpa.training.tasks import digest_of

        context.progress("loading the base model and the data", 0, 1)
        options, device = self._as_training(), torch_device(self.device)
        tokenizer = load_tokenizer(spec.base, trust_remote_code=self.trust_remote_code)
        objective = OBJECTIVES[options.objective](options, tokenizer)
        splits = objective.rows(context.seed_for("split"))
        model = attach_adapter(load_base(options, spec, device, ALONE), spec)
        rows = splits.training
        chosen = choose_rows(len(rows), self.batch_size, context.seed_for("calibration"), self.batches)
        context.progress("reading the gradient", 0, 1)
        shapes = {tensor.path: tensor.shape for pair in spec.pairs for tensor in pair}
        bases = gradient_bases(
            adapter_parameters(model, spec),
            spec,
            shapes,
            lambda batch: objective.calibration_loss(model, batch),
            [[rows[index] for index in batch] for batch in chosen],
        )
        return dict(bases), digest_of(splits, ()), len(chosen)

    def _as_training(self) -> Any:
        """Return the options of a training on the same data."""
        from qpa.training.training_options import TrainingOptions

        of_data = {field.name: getattr(self, field.name) for field in fields(DataOptions)}
        return TrainingOptions(
            **of_data,
            batch_size=self.batch_size,
            bf16=self.bf16,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


def check_basis_of(spec: AdapterSpec) -> None:
    """Check that an adapter is one that bases are shared for.

    Raises:  OptionError: it is not.
    """
    if spec.method != METHOD:
        raise OptionError("method", f"{METHOD}, whose directions are shared", spec.method)
    if spec.target_parameters:
        found = ", ".join(spec.target_parameters)
        raise OptionError("targets", "layers of their own, with a basis", f"stacked experts: {found}")
    if spec.parent is not None:
        advice = "leave it out"
        raise OptionError("continue_from", "none with a basis, whose adapters start as drawn", "one", advice)
