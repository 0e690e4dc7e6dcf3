"""Where the probability of a generator of one state went: to which layers, module types and directions.

A direction's probability is that of its basis state, with a qubit for the sign that of both states, and of
several circuits the mean. The rest is that of basis states to which nothing belongs. The coefficient of a
direction, squared, is how much of its module's change it makes: directions have unit length.

Source: ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qpa.documents import DirectionShare, PlaceShare
from qpa.explanation.adapter_parts import layer_of
from qpa.explanation.part import Subject, placed_chunks
from qpa.generators.features.kind import FEATURES


class Shares(NamedTuple):
    """See `qpa.documents.Explanation`."""

    places: tuple[PlaceShare, ...]
    directions: tuple[DirectionShare, ...]
    unused: float | None


def shares_of(subject: Subject) -> Shares:
    """Return the shares of a generator with registers; of others, nothing."""
    if not subject.layout.features.registers:
        return Shares((), (), None)
    probability, squares = _by_state(subject), _squares(subject)
    types = {tensor.path: tensor.module_type for tensor in subject.spec.tensors}
    places: dict[tuple[int | None, str], _Sums] = defaultdict(_Sums)
    directions: dict[int, _Sums] = defaultdict(_Sums)
    for one in placed_chunks(subject.layout):
        is_direction = one.group_index in squares
        name = types[one.tensor.path] if is_direction else one.group.name
        sums = [places[layer_of(one.tensor.path), name]]
        sums += [directions[one.number + 1]] if is_direction else []
        for found in sums:
            if probability is not None:
                found.probability = (found.probability or 0.0) + float(probability[one.state])
            if is_direction:
                found.squared = (found.squared or 0.0) + float(squares[one.group_index][one.chunk])
    return Shares(
        tuple(
            PlaceShare(layer=layer, module_type=name, probability=sums.probability, squared=sums.squared)
            for (layer, name), sums in places.items()
        ),
        tuple(
            DirectionShare(number=number, probability=sums.probability, squared=sums.squared or 0.0)
            for number, sums in sorted(directions.items())
        ),
        _unused(places.values()) if probability is not None else None,
    )


@dataclass
class _Sums:
    probability: float | None = None
    squared: float | None = None


def _unused(places: Iterable[_Sums]) -> float:
    return max(0.0, 1.0 - sum(place.probability or 0.0 for place in places))


def _by_state(subject: Subject) -> Tensor | None:
    """Return float64[2**n_qubits]: the probability of each basis state with its counterpart in sign."""
    if subject.probabilities is None:
        return None
    n_signs = FEATURES[subject.layout.features.kind].n_sign_qubits
    mean = subject.probabilities.double().mean(0)
    return (mean / mean.sum()).view(2**n_signs, -1).sum(0)


def _squares(subject: Subject) -> dict[int, Tensor]:
    """Return the share of each chunk in all squared coefficients, float64, by group of directions."""
    found = {}
    for index, group in enumerate(subject.layout.groups):
        if group.axis == "spectrum":
            values = subject.features[torch.tensor(group.states)].double()
            for layer in range(len(group.decoder.widths) - 1):
                values = values @ subject.arrays[f"decoders.{index}.weights.{layer}"].double().T
            found[index] = (values**2).sum(1)
    total = sum(float(squares.sum()) for squares in found.values()) or 1.0
    return {index: squares / total for index, squares in found.items()}
