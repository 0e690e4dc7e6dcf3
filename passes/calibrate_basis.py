"""calibrate-basis: the directions of a base model, once for all adapters of a shape.

Rules:
1. The gradient is read on batches of the training split as a training reads it, with its seeds: the basis of
   a training's own data, seed, batch size and number of batches holds the directions of that training, bit
   for bit. The default is more batches, for what is read once and serves the data of others.
2. Each name of `data` gives directions of its own, a bank. Directions of a mixture lose more than those of
   the kind of text that an adapter is for (docs/results.md), so nothing is mixed but what one name mixes.
3. All directions of the adapter's rank are kept, of which a layout uses the first.
4. What an adapter starts as is kept too, since lora_A is drawn with torch: expansion needs numpy alone.

Source: ours; see `qpa.training.calibration`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.documents import AdapterSpec, Bank, BasisTensor, Document, SharedBasis
from qpa.documents.base import json_text
from qpa.documents.shared_basis import MAX_BANKS
from qpa.errors import OptionError
from qpa.models.base_model import DEVICES
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.basis import INITIAL_PREFIX, name_in_bank
from qpa.training.data.data_options import DataOptions, names_of

if TYPE_CHECKING:
    from torch import Tensor

    from qpa.generators.generator import Bases
    from qpa.training.data.splits import Splits
    from qpa.training.objectives.objective import Objective

METHOD = "lora"

N_BATCHES = 128
"""Batches of each kind of text: many more than a training reads of its own data, see docs/results.md."""


@final
@dataclass(frozen=True)
class CalibrateBasis(DataOptions):
    """Read the gradient of a base model on each kind of data.

    Args:    data .. packing: see `DataOptions`.
             batches, batch_size: how many rows are read of each name of `data`.
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

    batches: int = option(
        N_BATCHES,
        help="Batches of each name of `data` of which the gradient is read.",
        at_least=1,
    )
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
        names = _names_of_banks(names_of(self.data))
        from qpa.adapters.attach import initial_adapter
        from qpa.adapters.low_rank import lora_config
        from qpa.compat.peft_ import KEY_PREFIX

        first = initial_adapter(source)
        arrays = {f"{INITIAL_PREFIX}{a.path}": first[a.path] for a, _ in source.pairs}
        banks: list[Bank] = []
        for bank, bases in self._banks(names, source, context):
            for path, basis in bases.items():
                arrays[name_in_bank(path, len(banks))] = basis.detach().cpu().float().contiguous()
            banks.append(bank)
        factors = {a.path: "A" for a, _ in source.pairs}
        return SharedBasis(
            provenance=context.provenance(self, source),
            base=source.base,
            banks=tuple(banks),
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

    def _banks(
        self, names: Sequence[str], spec: AdapterSpec, context: PassContext
    ) -> Iterator[tuple[Bank, Bases]]:
        """Yield each kind of text, and its directions by path."""
        from qpa.adapters.attach import attach_adapter
        from qpa.models.base_model import load_tokenizer, torch_device
        from qpa.training.base import load_base
        from qpa.training.objectives.objective import OBJECTIVES
        from qpa.training.processes import ALONE

        context.progress("loading the base model and the data", 0, 1)
        options, device = self._as_training(), torch_device(self.device)
        tokenizer = load_tokenizer(spec.base, trust_remote_code=self.trust_remote_code)
        of_each = [replace(options, data=(name,)) for name in names_of(self.data)]
        objectives = [OBJECTIVES[one.objective](one, tokenizer) for one in of_each]
        splits = [objective.rows(context.seed_for("split")) for objective in objectives]
        model = attach_adapter(load_base(options, spec, device, ALONE), spec)
        for name, objective, rows in zip(names, objectives, splits, strict=True):
            yield self._bank(name, spec, model, objective, rows, context)

    def _bank(
        self,
        name: str,
        spec: AdapterSpec,
        model: Any,
        objective: Objective,
        splits: Splits,
        context: PassContext,
    ) -> tuple[Bank, Bases]:
        from qpa.adapters.attach import adapter_parameters
        from qpa.training.calibration import choose_rows, gradient_bases
        from qpa.training.tasks import digest_of

        rows = splits.training
        chosen = choose_rows(len(rows), self.batch_size, context.seed_for("calibration"), self.batches)
        n_read = count(1)

        def loss(batch: Any) -> Tensor:
            found = objective.calibration_loss(model, batch)
            context.progress(f"reading the gradient on {name}", next(n_read), 2 * len(chosen))
            return found

        bases = gradient_bases(
            adapter_parameters(model, spec),
            spec,
            {tensor.path: tensor.shape for pair in spec.pairs for tensor in pair},
            loss,
            [[rows[index] for index in batch] for batch in chosen],
        )
        digest = digest_of(splits, ())
        return Bank(name=name, data_digest=digest, n_batches=len(chosen), batch_size=self.batch_size), bases

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


def _names_of_banks(names: Sequence[str]) -> list[str]:
    """Return the last parts of the names of data, as many as tell them apart.

    Raises:  OptionError: two are the same, or there are more than a compact adapter can number.
    """
    if len(names) > MAX_BANKS:
        raise OptionError("data", f"at most {MAX_BANKS} names, each a kind of text", str(len(names)))
    parts = [Path(name).parts for name in names]
    for name, ours in zip(names, parts, strict=True):
        if parts.count(ours) > 1:
            raise OptionError("data", "names of data that differ", f"{name} twice", "leave one out")
    n = next(n for n in count(1) if len({one[-n:] for one in parts}) == len(parts))
    return ["/".join(one[-n:]) for one in parts]


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
