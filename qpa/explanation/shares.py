"""Where the probability of a generator of one state went: to which layers, module types and directions.

A direction's probability is that of its basis state, with a qubit for the sign that of both states, and of
several circuits the mean. The rest is that of basis states to which nothing belongs. The coefficient of a
direction, squared, is how much of its module's change it makes: directions have unit length.

Source: ours.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from qpa.documents import ChunkedTensor, DirectionShare, PlaceShare
from qpa.explanation.adapter_parts import layer_of
from qpa.explanation.part import Subject
from qpa.generators.generator import GENERATORS


class Shares(NamedTuple):
    """See `qpa.documents.Explanation`."""

    places: tuple[PlaceShare, ...]
    directions: tuple[DirectionShare, ...]
    unused: float | None


def shares_of(subject: Subject) -> Shares:
    """Return the shares of a generator with registers; of others, nothing."""
    if not subject.layout.features.registers:
        return Shares((), (), None)
    probability = _by_state(subject)
    at: dict[tuple[int | None, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    by_direction: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    vectors: set[str] = set()
    squares = _squares(subject)
    total = sum(float(found.sum()) for found in squares.values()) or 1.0
    for index, group in enumerate(subject.layout.groups):
        seen: set[int] = set()
        for tensor in group.tensors:
            for number, chunk in enumerate(tensor.chunks):
                if chunk in seen:
                    continue
                seen.add(chunk)
                found = [float(probability[group.states[chunk]]) if probability is not None else 0.0, 0.0]
                name = group.name
                if index in squares:
                    found[1] = float(squares[index][chunk]) / total
                    name = _module_type(subject, tensor)
                    _add(by_direction[number + 1], found)
                else:
                    vectors.add(name)
                _add(at[layer_of(tensor.path), name], found)
    known = probability is not None
    places = tuple(
        PlaceShare(
            layer=layer,
            module_type=name,
            probability=p if known else None,
            squared=None if name in vectors else squared,
        )
        for (layer, name), (p, squared) in at.items()
    )
    directions = tuple(
        DirectionShare(number=number, probability=p if known else None, squared=squared)
        for number, (p, squared) in sorted(by_direction.items())
    )
    unused = max(0.0, 1.0 - sum(p for p, _ in at.values())) if known else None
    return Shares(places, directions, unused)


def _add(to: list[float], found: list[float]) -> None:
    for index, value in enumerate(found):
        to[index] += value


def _by_state(subject: Subject) -> Tensor | None:
    """Return float64[2**n_qubits]: the probability of each basis state with its counterpart in sign."""
    if subject.probabilities is None:
        return None
    registers = subject.layout.features.registers
    n_signs = len(registers) - len(GENERATORS[subject.layout.generator].registers)
    mean = subject.probabilities.double().mean(0)
    mean = mean / mean.sum()
    return mean.view(2**n_signs, -1).sum(0)


def _squares(subject: Subject) -> dict[int, Tensor]:
    """Return the squared coefficients of the chunks of every group of directions, float64, by group."""
    found = {}
    for index, group in enumerate(subject.layout.groups):
        if group.axis == "spectrum":
            values = subject.features[torch.tensor(group.states)].double()
            for layer in range(len(group.decoder.widths) - 1):
                values = values @ subject.arrays[f"decoders.{index}.weights.{layer}"].double().T
            found[index] = (values**2).sum(1)
    return found


def _module_type(subject: Subject, tensor: ChunkedTensor) -> str:
    return next(one.module_type for one in subject.spec.tensors if one.path == tensor.path)
