"""The canonical decoding of a trained generator: that of `qpa.serve`, whose bits are the same everywhere.

torch decodes in training, with sums in whatever order a device finds fast. What is served is computed once
more from the trained numbers, in numpy and in an order that is written down (`qpa.serve.decoding`).

Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import DocumentError
from qpa.generators.chunks import basis_names
from qpa.serve.arithmetic import Array
from qpa.serve.circuits import ANSATZ
from qpa.serve.decoding import Shape, decode, lengths, tensors_of
from qpa.serve.layout import SCHEMA, Layout

if TYPE_CHECKING:
    from torch import Tensor

_FEATURES = "chunk_features."


def layout_text(layout: WeightLayout) -> bytes:
    """Return the bytes of the layout's file that compact adapters name."""
    content = layout.model_dump(mode="json", include={"features", "ansatz", "groups"})
    return json.dumps(content | {"schema": SCHEMA}, sort_keys=True, separators=(",", ":")).encode()


def trained_numbers(
    layout: WeightLayout, arrays: Mapping[str, Tensor], probabilities: Tensor | None = None
) -> tuple[Array, ...]:
    """Return the arrays of a compact file, float32[n] each.

    Args:    arrays: of the trained generator.
             probabilities: float32[n_circuits, 2**n_qubits], to be kept in the place of the angles.
    Raises:  DocumentError: `qpa.serve` does not compute such features.
    """
    return _trained_numbers(serve_layout(layout), arrays, probabilities)


def _trained_numbers(
    layout: Layout, arrays: Mapping[str, Tensor], probabilities: Tensor | None
) -> tuple[Array, ...]:
    features = [name for name in sorted(arrays) if name.startswith(_FEATURES)]
    kept = [arrays[name] for name in features] if probabilities is None else [probabilities]
    kept += [arrays[f"decoders.{index}.weights.0"] for index in range(len(layout.groups))]
    numbers = tuple(_array(array).reshape(-1) for array in kept)
    expected = lengths(layout, are_probabilities=probabilities is not None)
    assert [len(array) for array in numbers] == expected
    return numbers


def refusal(layout: WeightLayout) -> DocumentError | None:
    """Return the error that says why an adapter of a layout has no canonical decoding; None where it has."""
    try:
        small = serve_layout(layout)
        lengths(small, are_probabilities=keeps_probabilities(layout))
    except DocumentError as error:
        return error
    return None


def keeps_probabilities(layout: WeightLayout) -> bool:
    """Return whether `qpa.serve` does not run the layout's circuits, so that it is given what they give."""
    return layout.features.has_circuits and layout.ansatz.kind != ANSATZ


def exact_probabilities(layout: WeightLayout, arrays: Mapping[str, Tensor]) -> Tensor | None:
    """Return what the circuits give, float32[n_circuits, 2**n_qubits]; None where `qpa.serve` runs them."""
    from qpa.circuits.circuit import Circuit
    from qpa.generators.generator import angles_of

    if not keeps_probabilities(layout):
        return None
    return Circuit(layout.ansatz).exact_probabilities(angles_of(layout, dict(arrays), None)).float()


def canonical_adapter(
    spec: AdapterSpec,
    layout: WeightLayout,
    arrays: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    probabilities: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the adapter of a trained generator, float32 on the CPU, by path.

    Args:    arrays: of the trained generator, with its bases.
             initial: the adapter before training, of which lora_A counts.
             probabilities: see `trained_numbers`.
    Raises:  DocumentError: `qpa.serve` does not compute such features, or a number is not finite.
    """
    import torch

    small = serve_layout(layout)
    numbers = _trained_numbers(small, arrays, probabilities)
    groups = decode(small, numbers, are_probabilities=probabilities is not None)
    bases = {path: _array(arrays[name]) for path, name in basis_names(layout).items()}
    shapes = {tensor.path: Shape(*tensor.shape) for tensor in spec.tensors}
    first = {a.path: _array(initial[a.path]) for a, _ in spec.pairs}
    return {path: torch.from_numpy(tensor) for path, tensor in tensors_of(shapes, first, bases, groups)}


def serve_layout(layout: WeightLayout) -> Layout:
    """Return a layout as `qpa.serve` reads it.

    Raises:  DocumentError: it is none that can be expanded.
    """
    return Layout.parse("the layout", layout_text(layout))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy().astype(np.float32)
    return array
