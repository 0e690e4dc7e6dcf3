"""The exporter of a format, by the format's name, and the formats of a kind of adapter.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from qpa.adapters.registry import KINDS
from qpa.documents.manifest import FORMATS
from qpa.errors import OptionError
from qpa.exporters.compact import FORMAT as COMPACT
from qpa.exporters.compact import ExportCompact
from qpa.exporters.format import Exporter
from qpa.pipeline.options import option, options_of


def _words(name: str) -> str:
    return ExportCompact.words if name == COMPACT else cast(type[Exporter], FORMATS[name]).words


@dataclass(frozen=True)
class FormatChoice:
    """The format that a user chooses for an export; which other options there are depends on it.

    Args:    format: a name in `FORMATS`, or "compact", which is a file and no directory.
    """

    section: ClassVar[str] = "export"

    format: str = option(
        "lora", help="Format to write: {choices}.", choices=lambda: (*FORMATS, COMPACT), choice_words=_words
    )


def exporter_for(name: str, options: Mapping[str, object]) -> Exporter | ExportCompact:
    """Return the exporter of a format.

    Args:    options: by field name; None is for those the user did not give.
    Raises:  OptionError: an unknown format, or an option that it does not have.
    """
    exporter: type[Any] = ExportCompact if name == COMPACT else FORMATS[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = {option.field for option in options_of(exporter)}
    for field in sorted(given.keys() - known):
        expected = f"no such option with `format` {name}"
        raise OptionError(field, expected, str(given[field]), "leave it out")
    made: Exporter | ExportCompact = exporter(**given)
    return made


def formats_for(method: str) -> tuple[str, ...]:
    """Return the names of the formats that carry a kind of adapter, the plainest first.

    The kind names some; formats from outside may name the kind.
    """
    named = KINDS[method].formats
    outside = [name for name in FORMATS.added() if method in cast(type[Exporter], FORMATS[name]).kinds]
    return (*named, *(name for name in outside if name not in named))
