"""freeze-adapter: from a trained generator to plain tensors.

Rules:
1. The frozen tensors are the live model's, bit for bit: the training process recorded them.
2. They are what the generator gives: the circuit is evaluated once more, exactly, and must agree with
   the record to float32 rounding.
3. Nothing downstream needs the generator, the layout or a circuit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from qpa.documents import AdapterSpec, Document, FrozenAdapter, TensorShape, TrainedGenerator, WeightLayout
from qpa.documents.trained_generator import INITIAL_PREFIX
from qpa.errors import DocumentError
from qpa.pipeline.pass_protocol import PassContext

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5


@final
@dataclass(frozen=True, slots=True)
class FreezeAdapter:
    """Keep the generated weights and leave the generator behind.

    Source:  ours.
    """

    name: ClassVar[str] = "freeze-adapter"
    consumes: ClassVar[type] = TrainedGenerator
    requires: ClassVar[tuple[type[Document], ...]] = (AdapterSpec, WeightLayout)
    produces: ClassVar[type[Document]] = FrozenAdapter

    def run(self, source: TrainedGenerator, context: PassContext) -> FrozenAdapter:
        """Check the recorded adapter against the generator and describe it.

        Raises:  DocumentError: a file is missing or damaged, or the two do not agree.
        """
        from safetensors.torch import load_file

        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        recorded = load_file(context.files.get(source.adapter))
        generated = generate_adapter(spec, layout, load_file(context.files.get(source.arrays)))
        _check_agreement(recorded, generated)
        return FrozenAdapter(
            provenance=context.provenance(self, source),
            base=spec.base,
            method=spec.method,
            rank=spec.rank,
            alpha=spec.alpha,
            target_modules=spec.target_modules,
            fan_in_fan_out=spec.fan_in_fan_out,
            tensors=tuple(TensorShape(path=tensor.path, shape=tensor.shape) for tensor in spec.tensors),
            arrays=source.adapter,
            probe=source.probe,
            source="exact",
            account=layout.account,
            result=source.result,
        )


def generate_adapter(spec: AdapterSpec, layout: WeightLayout, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return initial + generator() for a trained generator's arrays, float32 on the CPU, by path.

    Raises:  DocumentError: the arrays are not this layout's.
    """
    import torch

    from qpa.adapters.attach import initial_adapter
    from qpa.generators.generator import Generator

    generator = Generator(layout, layout.provenance.seed)
    from_base = {
        name.removeprefix(INITIAL_PREFIX): array
        for name, array in arrays.items()
        if name.startswith(INITIAL_PREFIX)
    }
    _check_from_base(spec, from_base)
    try:
        generator.load_state_dict({n: a for n, a in arrays.items() if not n.startswith(INITIAL_PREFIX)})
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise DocumentError(
            "the generator's arrays", "tensors of this layout", detail, "train again"
        ) from error
    initial = initial_adapter(spec, layout, from_base)
    with torch.no_grad():
        outputs = generator()
    generated = {
        tensor.path: initial[tensor.path] + output
        for tensor, output in zip(layout.tensors, outputs, strict=True)
    }
    return {tensor.path: generated[tensor.path] for tensor in spec.tensors}


def _check_from_base(spec: AdapterSpec, found: dict[str, Tensor]) -> None:
    expected = {tensor.path: tensor.shape for tensor in spec.tensors if tensor.initial == "base"}
    for path in sorted(expected.keys() | found.keys()):
        shape = tuple(found[path].shape) if path in found else None
        if shape != expected.get(path):
            wanted = f"initial values of shape {expected.get(path)}"
            raise DocumentError(path, wanted, str(shape), "train again")


def _check_agreement(recorded: dict[str, Tensor], generated: dict[str, Tensor]) -> None:
    if recorded.keys() != generated.keys():
        raise DocumentError(
            "the recorded adapter", f"{len(generated)} tensors", f"{len(recorded)} tensors or others"
        )
    for path, tensor in generated.items():
        if recorded[path].shape != tensor.shape:
            raise DocumentError(path, f"shape {tuple(tensor.shape)}", str(tuple(recorded[path].shape)))
        scale = max(1.0, float(tensor.abs().max()))
        difference = float((recorded[path] - tensor).abs().max())
        if not difference <= TOLERANCE * scale:
            raise DocumentError(
                path, "what the generator gives", f"a difference of {difference:.1e}", "train again"
            )
