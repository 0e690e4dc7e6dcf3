"""The parts of a generator itself: its circuits or their control, its decoders, and its qubits.

Rules:
1. Without the circuits, every chunk has the features that it had before the first step; another row gives
   all chunks of a group their mean feature. With them in another order, the chunks of every group exchange
   their features.
2. Without a decoder, its weights are zero. In another order, the chunks of its group exchange features.
3. Without a qubit, its bit is a coin's: p'(x) = (p(x) + p(x with the bit flipped)) / 2, in all circuits.
   In another order, its bit is flipped, as a NOT gate before the measurement does.

Source: ours; the question is that of QuXAI, arXiv 2505.10167, which drops and permutes a classifier's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qpa.documents import ChunkGroup, WeightLayout
from qpa.explanation.part import Change, Part, Subject
from qpa.generators.features.kind import FEATURES
from qpa.generators.generator import GENERATORS


def circuit_parts(subject: Subject) -> Iterator[Part]:
    """Yield what all circuits, or the control in their place, contribute: all that is trained in features."""
    kind = "circuit" if subject.layout.features.has_circuits else "control"
    groups = [group for group in subject.layout.groups if group.n_chunks > 1]
    orders = zip(*(subject.orders(group.name, group.n_chunks) for group in groups), strict=True)
    permuted = tuple(partial(_exchanged, subject, groups, order, subject.n_copied) for order in orders)
    yield Part(kind, f"{kind} at its start", lambda: Change(features=subject.start), permuted)
    yield Part(kind, f"{kind}, all alike", partial(_averaged, subject))


def decoder_parts(subject: Subject) -> Iterator[Part]:
    """Yield what every group's decoder contributes; a single group's exchange is that of all circuits."""
    groups = subject.layout.groups
    for index, group in enumerate(groups):
        orders = subject.orders(group.name, group.n_chunks if len(groups) > 1 else 1)
        permuted = tuple(partial(_exchanged, subject, [group], [order], 0) for order in orders)
        yield Part("decoder", f"decoder {group.name}", partial(_without_decoder, subject, index), permuted)


def qubit_parts(subject: Subject) -> Iterator[Part]:
    """Yield what every qubit contributes; nothing for a control, which has none."""
    if subject.probabilities is None:
        return
    for qubit, words in enumerate(qubit_words(subject.layout)):
        name = f"q{qubit} ({words})" if words else f"q{qubit}"
        yield Part(
            "qubit", name, partial(_averaged_bit, subject, qubit), (partial(_flipped_bit, subject, qubit),)
        )


def qubit_words(layout: WeightLayout) -> list[str]:
    """Return for every qubit what the register to which it belongs counts; "" where nothing is known."""
    features, n_qubits = layout.features, layout.ansatz.n_qubits
    if features.registers:
        names = GENERATORS[layout.generator].registers
        words = ("sign",) * FEATURES[features.kind].n_sign_qubits + names
        if len(words) != len(features.registers):
            return [""] * n_qubits
        return [word for word, n in zip(words, features.registers, strict=True) for _ in range(n)]
    if features.windows is None:
        return [""] * n_qubits
    n_window, n_chunk = features.windows.n_window_qubits, features.windows.n_chunk_qubits
    n_rest = n_qubits - n_window - n_chunk
    return ["window"] * n_window + ["chunk"] * n_chunk + ["group"] * n_rest


def _averaged(subject: Subject) -> Change:
    """Return the change after which all chunks of a group have their mean feature of each circuit."""
    features = subject.features.clone()
    for group in subject.layout.groups:
        states = torch.tensor(group.states)
        features[states, subject.n_copied :] = features[states, subject.n_copied :].mean(0)
    return Change(features=features)


def _exchanged(
    subject: Subject, groups: Sequence[ChunkGroup], orders: Sequence[Sequence[int]], first: int
) -> Change:
    """Return the change after which chunks of groups have each other's features, from column `first` on."""
    features = subject.features.clone()
    for group, order in zip(groups, orders, strict=True):
        states = torch.tensor(group.states)
        features[states, first:] = subject.features[states[list(order)], first:]
    return Change(features=features)


def _without_decoder(subject: Subject, index: int) -> Change:
    """Return the change after which the weights of a group's decoder are zero."""
    prefix = f"decoders.{index}."
    own = {name: array for name, array in subject.arrays.items() if name.startswith(prefix)}
    return Change(arrays={name: torch.zeros_like(array) for name, array in own.items()})


def _averaged_bit(subject: Subject, qubit: int) -> Change:
    probabilities = subject.measured
    return Change(probabilities=(probabilities + flipped(probabilities, qubit)) / 2)


def _flipped_bit(subject: Subject, qubit: int) -> Change:
    return Change(probabilities=flipped(subject.measured, qubit))


def flipped(probabilities: Tensor, qubit: int) -> Tensor:
    """Return distributions float[n_circuits, 2**n_qubits] after a NOT on a qubit."""
    n_states = probabilities.shape[1]
    return probabilities[:, torch.arange(n_states) ^ (n_states >> qubit + 1)]
