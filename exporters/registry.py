"""The exporter of a format, by the format's name.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import cast

from qpa.documents.manifest import FORMATS
from qpa.errors import OptionError
from qpa.exporters.format import Exporter


def exporter_for(name: str, options: Mapping[str, object]) -> Exporter:
    """Return the exporter of a format.

    Args:    options: by field name; None is for those the user did not give.
    Raises:  OptionError: an unknown format, or an option that it does not have.
    """
    exporter = cast(type[Exporter], FORMATS[name])
    given = {option: value for option, value in options.items() if value is not None}
    known = {field.name for field in fields(exporter)}
    for option in sorted(given.keys() - known):
        text = "--" + option.replace("_", "-")
        raise OptionError(text, f"no such option with --format {name}", str(given[option]), "leave it out")
    return exporter(**given)
