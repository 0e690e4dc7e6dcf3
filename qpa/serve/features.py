"""The features of basis states, in numpy and with the same bits everywhere.

A layout's features are numbers that depend on a chunk's basis state alone: those of circuits, or those of a
classical generator in their place. What each kind means is in the files of `qpa.generators.features`; here
are the kinds that the planner of `qpa plan` chooses, each computed from the arrays that were trained.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice

import numpy as np

from qpa.errors import DocumentError, QpaError, one_of
from qpa.serve.arithmetic import MAX_ARGUMENT, MAX_EXPONENT, Array, exp
from qpa.serve.circuits import ANSATZ, FEATURE_MEAN, chain_probabilities
from qpa.serve.layout import Layout

FEATURE_EPSILON = 0.01

CIRCUITS = ("circuit", "signed", "random")


def features_of(layout: Layout, arrays: Sequence[Array], *, are_probabilities: bool) -> Array:
    """Return float64[2**n_qubits, n_circuits].

    Args:    arrays: float64, of the lengths that `lengths_of` gives, in that order.
             are_probabilities: whether the one array has probabilities in the place of angles.
    Raises:  DocumentError: a number is out of the range in which features are computed.
    """
    if layout.features not in CIRCUITS:
        return KINDS[layout.features](layout, arrays)[:, None]
    (numbers,) = arrays
    if are_probabilities:
        if numbers.size and numbers.min() < 0:
            raise DocumentError("the probabilities", "numbers of at least 0", str(numbers.min()))
        probabilities = numbers.reshape(layout.n_circuits, layout.n_states)
    else:
        _check_size("the angles", numbers, MAX_ARGUMENT)
        probabilities = chain_probabilities(numbers.reshape(layout.n_circuits, -1), layout.n_qubits)
    roots = _roots(layout, probabilities)
    if layout.features == "signed":
        plus, minus = np.split(roots, 2, axis=1)
        roots = np.concatenate((plus - minus, minus - plus), axis=1)
    return roots.T


def lengths_of(layout: Layout, *, are_probabilities: bool) -> list[int]:
    """Return how many numbers each array has from which the features are computed.

    Raises:  DocumentError: such features, or such circuits, are not computed here.
    """
    if layout.features in CIRCUITS:
        if are_probabilities:
            if layout.n_window_qubits is None and layout.ansatz != ANSATZ:
                raise DocumentError(
                    "the layout's circuits", f"windows, or the ansatz {ANSATZ}", layout.ansatz
                )
            return [layout.n_circuits * layout.n_states]
        if layout.ansatz != ANSATZ:
            raise DocumentError("the layout's ansatz", ANSATZ, layout.ansatz, "keep probabilities instead")
        return [layout.n_circuits * layout.n_layers * layout.n_qubits]
    if layout.features not in KINDS or are_probabilities:
        raise refusal(layout.features)
    if layout.n_circuits != 1 or not layout.registers:
        found = f"{layout.n_circuits} of registers {list(layout.registers)}"
        raise DocumentError("the layout's features", "one for each state of some registers", found)
    return LENGTHS.get(layout.features, _control_alone)(layout)


def refusal(features: str) -> QpaError:
    """Return the error for features that are not computed here."""
    return DocumentError("the layout's features", one_of((*CIRCUITS, *KINDS)), features[:60])


def _control_alone(layout: Layout) -> list[int]:
    most = layout.n_states - 1 if layout.features == "log-linear" else len(layout.states)
    if layout.n_control > most or (layout.features == "constant" and layout.n_control):
        raise DocumentError("the layout's features", f"at most {most} trained numbers", str(layout.n_control))
    return [layout.n_control]


def _of_tables(layout: Layout) -> list[int]:
    sizes = _register_sizes(layout)
    n_terms, rest = divmod(layout.n_control, sum(sizes))
    if rest or not n_terms:
        expected = f"tables of a multiple of {sum(sizes)} numbers"
        raise DocumentError("the layout's features", expected, str(layout.n_control))
    if n_terms > MAX_TERMS:
        raise DocumentError("the layout's features", f"at most {MAX_TERMS} terms of tables", str(n_terms))
    return [n_terms * size for size in sizes]


MAX_TERMS = 4096

LENGTHS: dict[str, Callable[[Layout], list[int]]] = {"tables": _of_tables}
"""How many numbers the arrays of a kind have, where it is not one array of `n_control`."""


def _check_size(subject: str, numbers: Array, limit: float) -> None:
    largest = float(np.abs(numbers).max(initial=0.0))
    if not largest <= limit:
        raise DocumentError(subject, f"numbers between -{limit:,.0f} and {limit:,.0f}", f"{largest:.3g}")


def _roots(layout: Layout, probabilities: Array) -> Array:
    """Return the root features of probabilities, see `qpa.generators.features.circuit`."""
    if layout.n_window_qubits is None:
        return np.sqrt(probabilities * float(layout.n_states) + FEATURE_EPSILON) - FEATURE_MEAN
    n_inside = 2.0 ** (layout.n_qubits - layout.n_window_qubits)
    return np.sqrt(probabilities * n_inside + FEATURE_EPSILON) - math.sqrt(FEATURE_EPSILON)


def _constant(layout: Layout, arrays: Sequence[Array]) -> Array:
    return np.ones(layout.n_states)


def _log_linear(layout: Layout, arrays: Sequence[Array]) -> Array:
    (weights,) = arrays
    exponents = np.zeros(layout.n_states)
    signs = 1.0 - 2.0 * _bits(layout.n_qubits)
    for bits, weight in zip(islice(subsets(layout.n_qubits), len(weights)), weights, strict=True):
        parity = signs[list(bits)].prod(axis=0)  # of ones and minus ones, so that no order matters
        exponents += parity * weight
    _check_size("the log-linear features' exponents", exponents, MAX_EXPONENT)
    return exp(exponents)


def _tables(layout: Layout, arrays: Sequence[Array]) -> Array:
    sizes = _register_sizes(layout)
    numbers = [
        np.minimum(found, size - 1) for found, size in zip(_register_numbers(layout), sizes, strict=True)
    ]
    tables = [table.reshape(-1, size) for table, size in zip(arrays, sizes, strict=True)]
    total = np.zeros(layout.n_states)
    for term in range(len(tables[0])):
        product = np.ones(layout.n_states)
        for table, places in zip(tables, numbers, strict=True):
            product *= table[term][places]
        total += product
    return total


def _own(layout: Layout, arrays: Sequence[Array]) -> Array:
    (numbers,) = arrays
    states = np.array(layout.states)
    direction = states & ((1 << layout.registers[-1]) - 1)
    order = np.argsort(direction, kind="stable")[: len(numbers)]
    features = np.ones(layout.n_states)
    features[states[order]] = numbers
    return features


KINDS: dict[str, Callable[[Layout, Sequence[Array]], Array]] = {
    "constant": _constant,
    "log-linear": _log_linear,
    "tables": _tables,
    "own": _own,
}
"""The features of a classical generator in the place of circuits; each returns float64[2**n_qubits]."""


def _bits(n_qubits: int) -> Array:
    """Return float64[n_qubits, 2**n_qubits], the most significant bit first."""
    shifts = np.arange(n_qubits - 1, -1, -1)[:, None]
    return ((np.arange(2**n_qubits) >> shifts) & 1).astype(np.float64)


def subsets(n_qubits: int) -> Iterator[tuple[int, ...]]:
    """Yield the non-empty sets of qubits: by their size, then by the width that they span, then from left."""
    for size in range(1, n_qubits + 1):
        yield from sorted(combinations(range(n_qubits), size), key=lambda bits: (bits[-1] - bits[0], bits))


def _register_numbers(layout: Layout) -> list[Array]:
    """Return int64[2**n_qubits] for each register: the number that it holds in every basis state."""
    numbers, rest = [], np.arange(layout.n_states)
    for n_qubits in reversed(layout.registers):
        numbers.append(rest & ((1 << n_qubits) - 1))
        rest = rest >> n_qubits
    return numbers[::-1]


def _register_sizes(layout: Layout) -> list[int]:
    """Return how many numbers of each register the chunks use, counted up to the largest."""
    states = np.array(layout.states)
    return [1 + int(numbers[states].max()) for numbers in _register_numbers(layout)]
