"""The methods a bench knows, by their names on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qpa.bench.direct import DIRECT
from qpa.bench.fixed_basis import FIXED_BASIS
from qpa.bench.generated import GENERATED, GENERATED_KINDS, GENERATED_STATES
from qpa.bench.method import Method
from qpa.bench.peft_methods import PEFT_METHODS
from qpa.bench.ranked import RANKED
from qpa.errors import OptionError

METHODS: dict[str, Method] = {
    **GENERATED,
    **GENERATED_STATES,
    **GENERATED_KINDS,
    **PEFT_METHODS,
    **DIRECT,
    **FIXED_BASIS,
    **RANKED,
}

ABLATION = tuple(GENERATED)
"""qpa, its controls, and its variants: what `qpa bench --ablate` compares."""


def find_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names, each once, in this order.

    Raises:  OptionError: no names, or one that is unknown.
    """
    if not names:
        raise OptionError("methods", "names of methods", "none", "known are " + ", ".join(METHODS))
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.5)
            raise OptionError("methods", "known methods", name, "known are " + ", ".join(near or METHODS))
    return tuple(METHODS[name] for name in dict.fromkeys(names))
