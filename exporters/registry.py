"""The exporter of a format, by the format's name, and the formats of a kind of adapter.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from qpa.adapters.registry import KINDS
from qpa.documents import FrozenAdapter
from qpa.documents.manifest import FORMATS
from qpa.errors import OptionError
from qpa.exporters.format import ExportedFile, FileFormat, Format
from qpa.pipeline.options import option, options_of
from qpa.pipeline.pass_protocol import PassContext


@dataclass(frozen=True)
class FormatChoice:
    """The format that a user chooses for an export; which other options there are depends on it.

    Args:    format: a name in `FORMATS`.
    """

    section: ClassVar[str] = "export"

    format: str = option(
        "lora",
        help="Format to write: {choices}.",
        choices=FORMATS,
        choice_words=lambda name: known(name).words,
    )


def known(name: str) -> type[Format]:
    """Return the class of a format's exporters.

    Raises:  OptionError: there is no such format.
    """
    return cast(type[Format], FORMATS[name])


def exporter_for(name: str, options: Mapping[str, object]) -> Format:
    """Return the exporter of a format.

    Args:    options: by field name; None is for those the user did not give.
    Raises:  OptionError: an unknown format, or an option that it does not have.
    """
    exporter: type[Any] = known(name)
    given = {option: value for option, value in options.items() if value is not None}
    fields = {option.field for option in options_of(exporter)}
    for field in sorted(given.keys() - fields):
        expected = f"no such option with `format` {name}"
        raise OptionError(field, expected, str(given[field]), "leave it out")
    made: Format = exporter(**given)
    return made


def formats_for(method: str) -> tuple[str, ...]:
    """Return the names of the formats that carry a kind of adapter, the plainest first.

    The kind names some; formats from outside may name the kind.
    """
    named = KINDS[method].formats
    outside = [name for name in FORMATS.added() if method in known(name).kinds]
    return (*named, *(name for name in outside if name not in named))


def found_file(frozen: FrozenAdapter, out: Path, context: PassContext) -> ExportedFile | None:
    """Return what was exported from a run to a file; None where that is not what the run gives.

    Args:    context: of the run, with all of its documents.
    Raises:  DocumentError: a file of the run is missing or damaged.
    """
    for kind in map(known, FORMATS):
        if issubclass(kind, FileFormat) and (found := kind.found(frozen, out, context)) is not None:
            return found
    return None
