"""The parts of the adapter that a generator makes: directions, layers, module types and roles of tensors.

Rules:
1. Without directions, their coefficients are zero, in all modules. Rows of their own have the steepest
   direction, the second, the next two, the next four, and so on. In another order, the directions of each
   module exchange their coefficients.
2. Without a layer, a module type or a role, its tensors are as they start.
3. In another order, layers exchange the features of chunks that are alike but for the layer.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qpa.documents import AdapterTensor
from qpa.explanation.part import Change, Part, Subject, placed_chunks
from qpa.generators.chunks import basis_names

Places = list[dict[int, int]]
"""Chunks that are alike but for their layer: of each sort, the basis state by layer."""


def direction_parts(subject: Subject) -> Iterator[Part]:
    """Yield what the singular directions of the gradient contribute; nothing where there are none."""
    pairs = _bases(subject)
    n_directions = max((subject.arrays[b].shape[1] for _, b in pairs), default=0)
    if not n_directions:
        return
    orders = list(subject.orders("directions", n_directions))
    permuted = tuple(partial(_reordered, subject, pairs, order) for order in orders)
    yield Part("directions", "all directions", partial(_without, subject, pairs, 0, n_directions), permuted)
    for first, last in bands(n_directions) if n_directions > 1 else ():
        yield Part("directions", band_name(first, last), partial(_without, subject, pairs, first, last))


def bands(n_directions: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds [first, last) of bands of directions: one, one, two, four and so on."""
    first, last = 0, 1
    while first < n_directions:
        yield first, min(last, n_directions)
        first, last = last, 2 * last


def band_name(first: int, last: int) -> str:
    """Return "directions 3 to 4" for the band [2, 4)."""
    return f"direction {last}" if last - first == 1 else f"directions {first + 1} to {last}"


def layer_parts(subject: Subject) -> Iterator[Part]:
    """Yield what every layer's tensors contribute, and that they are in this order."""
    layers = sorted({layer for t in subject.spec.tensors if (layer := layer_of(t.module)) is not None})
    places = _places(subject)
    if len(layers) > 1 and places:
        orders = subject.orders("layers", len(layers))
        permuted = tuple(partial(_layers_exchanged, subject, places, layers, order) for order in orders)
        yield Part("layer", "the order of layers", None, permuted)
    for layer in layers:
        own = [tensor for tensor in subject.spec.tensors if layer_of(tensor.module) == layer]
        yield Part("layer", f"layer {layer}", partial(reset, own))


def type_parts(subject: Subject) -> Iterator[Part]:
    """Yield what every module type's tensors contribute, where there are several."""
    names = list(dict.fromkeys(tensor.module_type for tensor in subject.spec.tensors))
    for name in names if len(names) > 1 else ():
        own = [tensor for tensor in subject.spec.tensors if tensor.module_type == name]
        yield Part("module type", name, partial(reset, own))


def role_parts(subject: Subject) -> Iterator[Part]:
    """Yield what all tensors of a role contribute, such as DoRA's magnitudes or the angles of QTHA.

    Nothing of a product of two factors alone: without either, there is nothing left.
    """
    names = list(dict.fromkeys(tensor.role for tensor in subject.spec.tensors))
    for name in names if len(names) > 2 else ():
        own = [tensor for tensor in subject.spec.tensors if tensor.role == name]
        yield Part("role", f"all {name}", partial(reset, own))


def layer_of(path: str) -> int | None:
    """Return the first number in a path, that of the layer; None where there is none."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def reset(tensors: Iterable[AdapterTensor]) -> Change:
    """Return the change after which tensors are as they start."""
    return Change(reset=frozenset(tensor.path for tensor in tensors))


def _bases(subject: Subject) -> list[tuple[str, str]]:
    """Return the names of the arrays of every spectrum's right and left singular vectors."""
    names = basis_names(subject.layout)
    spectra = (group for group in subject.layout.groups if group.axis == "spectrum")
    return [
        (names[a.path], names[b.path])
        for group in spectra
        for a, b in zip(group.tensors[::2], group.tensors[1::2], strict=True)
    ]


def _without(subject: Subject, pairs: Sequence[tuple[str, str]], first: int, last: int) -> Change:
    """Return the change without directions [first, last): their left singular vectors are zero."""
    changed: dict[str, Tensor] = {}
    for _, b in pairs:
        changed[b] = subject.arrays[b].clone()
        changed[b][:, first:last] = 0
    return Change(arrays=changed)


def _reordered(subject: Subject, pairs: Sequence[tuple[str, str]], order: Sequence[int]) -> Change:
    """Return the change after which each module's directions have each other's coefficients.

    A module with fewer directions than others keeps the order of those that it has.
    """
    changed: dict[str, Tensor] = {}
    for a, b in pairs:
        n = subject.arrays[b].shape[1]
        own = [index for index in order if index < n]
        changed |= {a: subject.arrays[a][own].contiguous(), b: subject.arrays[b][:, own].contiguous()}
    return Change(arrays=changed)


def _places(subject: Subject) -> Places:
    """Return the chunks by layer, those of one sort together; a sort that one layer has alone is left out."""
    found: dict[tuple[str, str, int], dict[int, int]] = {}
    for one in placed_chunks(subject.layout):
        layer = layer_of(one.tensor.path)
        if layer is not None:
            path = one.tensor.path.replace(f".{layer}.", ".*.", 1)
            found.setdefault((one.group.name, path, one.number), {})[layer] = one.state
    return [states for states in found.values() if len(states) > 1]


def _layers_exchanged(
    subject: Subject, places: Places, layers: Sequence[int], order: Sequence[int]
) -> Change:
    """Return the change after which layers have each other's features."""
    rank = {layer: order[index] for index, layer in enumerate(layers)}
    features = subject.features.clone()
    for states in places:
        present = sorted(states)
        to = torch.tensor([states[layer] for layer in present])
        from_ = torch.tensor([states[layer] for layer in sorted(present, key=rank.__getitem__)])
        features[to] = subject.features[from_]
    return Change(features=features)
