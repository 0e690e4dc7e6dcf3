"""The canonical decoding of a trained generator: that of `qpa.serve`, whose bits are the same everywhere.

torch decodes in training, with sums in whatever order a device finds fast. What is served is computed once
more from the trained numbers, in numpy and in an order that is written down (`qpa.serve.decoding`).

Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import DocumentError
from qpa.generators.chunks import basis_names
from qpa.serve.arithmetic import Array
from qpa.serve.circuits import ANSATZ
from qpa.serve.compact import Compact
from qpa.serve.decoding import Shape, decode, lengths, tensors_of
from qpa.serve.layout import SCHEMA, Layout

if TYPE_CHECKING:
    from torch import Tensor

_FEATURES = "chunk_features."


def layout_text(layout: WeightLayout) -> bytes:
    """Return the bytes of the layout's file that compact adapters name."""
    content = layout.model_dump(mode="json", include={"features", "ansatz", "groups"})
    return json.dumps(content | {"schema": SCHEMA}, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class TrainedNumbers:
    """What a compact adapter keeps of a trained generator, and what it is decoded with.

    Args:    text: the bytes of the layout's file; layout: the same, read.
             arrays: float32[n] each, in the order of a compact file.
             are_probabilities: whether the first is probabilities in the place of angles.
             bases: the directions by the path of their tensor, which a compact adapter leaves out.
    """

    text: bytes
    layout: Layout
    arrays: tuple[Array, ...]
    are_probabilities: bool
    bases: Mapping[str, Tensor]

    def compact(self, basis: str, bank: int = 0) -> Compact:
        """Return the compact file's content.

        Args:    basis: its digest in hexadecimal.
                 bank: the number of the basis's bank that has the directions.
        """
        digest = self.layout.digest
        return Compact(bytes.fromhex(basis), digest, self.are_probabilities, self.arrays, bank)

    def adapter(self, spec: AdapterSpec, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapter, float32 on the CPU, by path.

        Args:    initial: the adapter before training, of which lora_A counts.
        Raises:  DocumentError: a number is not finite.
        """
        import torch

        groups = decode(self.layout, self.arrays, are_probabilities=self.are_probabilities)
        shapes = {tensor.path: Shape(*tensor.shape) for tensor in spec.tensors}
        first = {a.path: _array(initial[a.path]) for a, _ in spec.pairs}
        bases = {path: _array(basis) for path, basis in self.bases.items()}
        found = tensors_of(shapes, first, bases, groups)
        return {path: torch.from_numpy(tensor) for path, tensor in found}


def trained_numbers(
    layout: WeightLayout, arrays: Mapping[str, Tensor], probabilities: Tensor | None = None
) -> TrainedNumbers:
    """Return what is kept of a trained generator.

    Args:    arrays: of the trained generator, with its bases.
             probabilities: float32[n_circuits, 2**n_qubits], to be kept in the place of the angles.
    Raises:  DocumentError: `qpa.serve` does not compute such features.
    """
    text = layout_text(layout)
    small = _parsed(text)
    expected = lengths(small, are_probabilities=probabilities is not None)
    features = [name for name in sorted(arrays) if name.startswith(_FEATURES)]
    kept = [arrays[name] for name in features] if probabilities is None else [probabilities]
    kept += [arrays[f"decoders.{index}.weights.0"] for index in range(len(small.groups))]
    numbers = tuple(_array(array).reshape(-1) for array in kept)
    assert [len(array) for array in numbers] == expected
    bases = {path: arrays[name] for path, name in basis_names(layout).items()}
    return TrainedNumbers(text, small, numbers, probabilities is not None, bases)


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
    return trained_numbers(layout, arrays, probabilities).adapter(spec, initial)


def serve_layout(layout: WeightLayout) -> Layout:
    """Return a layout as `qpa.serve` reads it.

    Raises:  DocumentError: it is none that can be expanded.
    """
    return _parsed(layout_text(layout))


def _parsed(text: bytes) -> Layout:
    return Layout.parse("the layout", text)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy().astype(np.float32)
    return array
