"""The exporter of a format, by the format's name.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from qpa.documents.manifest import FORMATS
from qpa.errors import OptionError
from qpa.exporters.format import Exporter
from qpa.pipeline.options import options_of


def exporter_for(name: str, options: Mapping[str, object]) -> Exporter:
    """Return the exporter of a format.

    Args:    options: by field name; None is for those the user did not give.
    Raises:  OptionError: an unknown format, or an option that it does not have.
    """
    exporter = cast(type[Exporter], FORMATS[name])
    given = {option: value for option, value in options.items() if value is not None}
    known = {option.field for option in options_of(exporter)}
    for field in sorted(given.keys() - known):
        expected = f"no such option with `format` {name}"
        raise OptionError(field, expected, str(given[field]), "leave it out")
    return exporter(**given)
