"""Settling: at the end of a training on a shared basis the live adapter becomes its canonical decoding.

What is scored, recorded and frozen is then what `qpa.serve` makes of the trained numbers alone, bit for bit.
Only where probabilities were measured the frozen adapter is another one, that of the measurement.

Source: ours.
"""

from __future__ import annotations

from qpa.adapters.attach import initial_adapter, set_adapter
from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.canonical import canonical_adapter, exact_probabilities, refusal
from qpa.training.generated_adapter import GeneratedAdapter


def settle(adapted: GeneratedAdapter, spec: AdapterSpec, layout: WeightLayout, source: str) -> None:
    """Set a live adapter on a basis to its canonical decoding; leave any other alone.

    Args:    source: what ran the circuits; other probabilities than exact ones are measured again.
    """
    if spec.basis is None or source != "exact" or refusal(layout) is not None:
        return
    arrays = {name: tensor.detach().cpu() for name, tensor in adapted.generator.state_dict().items()}
    probabilities = exact_probabilities(layout, arrays)
    values = canonical_adapter(spec, layout, arrays, initial_adapter(spec), probabilities)
    set_adapter(adapted.parameters, values)
