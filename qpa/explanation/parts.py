"""All parts of a trained generator that can be explained, and the adapter that each change gives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from qpa.explanation.adapter_parts import (
    direction_parts,
    layer_parts,
    reset,
    role_parts,
    type_parts,
)
from qpa.explanation.generator_parts import circuit_parts, decoder_parts, qubit_parts
from qpa.explanation.part import Part, Subject

if TYPE_CHECKING:
    from qpa.documents import WeightLayout


def whole_of(subject: Subject) -> Part:
    """Return the adapter as a part: without it there is what the training started from."""
    return Part("", "the whole adapter", partial(reset, subject.spec.tensors))


def parts_of(subject: Subject) -> Iterator[Part]:
    """Yield the parts, kind by kind; of a generator without chunks those of the adapter alone."""
    if subject.layout.groups:
        yield from circuit_parts(subject)
        yield from decoder_parts(subject)
        yield from direction_parts(subject)
        yield from qubit_parts(subject)
    yield from layer_parts(subject)
    yield from type_parts(subject)
    yield from role_parts(subject)


def left_out(layout: WeightLayout) -> str:
    """Return in a sentence what of a generator is not explained; "" where everything is."""
    if not layout.parametrized:
        return ""
    tensors = "tensor comes" if len(layout.parametrized) == 1 else "tensors come"
    return (
        f"{len(layout.parametrized):,} {tensors} of numbers without chunks, as the generator "
        f"{layout.generator} has them: these are told apart by layers, module types and roles alone."
    )
