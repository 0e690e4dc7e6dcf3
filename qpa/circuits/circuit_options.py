"""The options of how circuits are run and for which device, which do nothing where a plan has none to run."""

from __future__ import annotations

from qpa.documents import WeightLayout
from qpa.errors import OptionError
from qpa.pipeline.options import options_of

PANEL = "Circuits and devices"
"""The heading of these options in help, by which they are known."""

_AS_BY_DEFAULT = ("exact", "adjoint")
"""The source and the estimator of gradients that no option means too: they may be named everywhere."""


def refuse_without_circuits(options: object, layout: WeightLayout) -> None:
    """Check that no option about circuits is given where no circuit of a plan is measured.

    These are plans of controls, and of generators whose numbers come without chunks.

    Args:    options: a pass, or the options of a training.
    Raises:  OptionError: one is given; the error names the first.
    """
    if layout.features.has_circuits:
        return
    for option in options_of(type(options)):
        value = getattr(options, option.field)
        if option.panel == PANEL and value not in (option.default, *_AS_BY_DEFAULT):
            expected = "none, since no circuit of the plan is measured"
            raise OptionError(option.field, expected, str(value), "leave it out")
