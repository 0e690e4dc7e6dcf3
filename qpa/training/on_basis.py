"""What a training on a shared basis does before its first step and after its last.

Rules:
1. Before the first step it takes the directions of the bank along which the loss falls the steepest on the
   training's own data: that of the kind of text that is most like it.
2. *Settling*: at the end the live adapter becomes its canonical decoding. What is scored, recorded and frozen
   is then what `qpa.serve` makes of the trained numbers alone, bit for bit. Only where probabilities were
   measured the frozen adapter is another one, that of the measurement.

Source: ours; rule 1 is measured in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qpa.adapters.attach import initial_adapter, set_adapter
from qpa.adapters.on_basis import directions
from qpa.documents import AdapterSpec, ChosenBank, WeightLayout
from qpa.generators.canonical import canonical_adapter, exact_probabilities, refusal
from qpa.generators.chunks import basis_shapes
from qpa.serve.basis import Basis
from qpa.training.calibration import slope_shares
from qpa.training.generated_adapter import GeneratedAdapter


def take_directions(
    adapted: GeneratedAdapter,
    basis: Basis,
    spec: AdapterSpec,
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> ChosenBank:
    """Give a generator the directions of the bank that suits the data best; see rule 1.

    Args:    loss, batches: see `qpa.training.calibration.gradient_bases`.
    Raises:  DivergedError: the gradient is not finite.
             DocumentError: the basis's file is gone.
    """
    shapes = basis_shapes(adapted.generator.layout)
    if not shapes:
        return ChosenBank(number=0, name=basis.banks[0], slope_share=None)
    numbers = range(len(basis.banks))
    banks = (directions(basis, number, shapes) for number in numbers)
    shares = slope_shares(adapted.parameters, spec, shapes, loss, batches, banks)
    best = max(numbers, key=shares.__getitem__)
    adapted.take_bases(directions(basis, best, shapes))
    return ChosenBank(number=best, name=basis.banks[best], slope_share=shares[best])


def settle(adapted: GeneratedAdapter, spec: AdapterSpec, layout: WeightLayout, source: str) -> None:
    """Set a live adapter on a basis to its canonical decoding; leave any other alone. See rule 2.

    Args:    source: what ran the circuits; other probabilities than exact ones are measured again.
    """
    if spec.basis is None or source != "exact" or refusal(layout) is not None:
        return
    arrays = {name: tensor.detach().cpu() for name, tensor in adapted.generator.state_dict().items()}
    probabilities = exact_probabilities(layout, arrays)
    values = canonical_adapter(spec, layout, arrays, initial_adapter(spec), probabilities)
    set_adapter(adapted.parameters, values)
