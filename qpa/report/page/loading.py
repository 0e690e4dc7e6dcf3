"""How the formats that carry an adapter are loaded, in the words of their own cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from qpa.documents import FrozenAdapter
from qpa.errors import ExportError

if TYPE_CHECKING:
    from qpa.exporters.format import Exported, Format
    from qpa.pipeline.pass_protocol import PassContext

_PLACES = ("path/to/this/directory", "path/to/this/file")


@dataclass(frozen=True)
class Loading:
    """How one format is loaded.

    Args:    words: what the format is for, and where it is.
             directory: of the export, or its file, or where one could be made.
             is_made: whether it is there.
             text: what its card says; None where it cannot carry the adapter.
             refusal: the reason.
    """

    format: str
    words: str
    directory: str
    is_made: bool
    text: Markup | None = None
    refusal: str = ""


def ways_to_load(
    frozen: FrozenAdapter, name: str, exports: Sequence[tuple[Path, Exported]], context: PassContext
) -> list[Loading]:
    """Return how the exports are loaded, and then the other formats that carry the adapter.

    Args:    name: of the run, after which an export could be named.
             context: of the run.
    """
    from qpa.exporters.registry import exporter_for, formats_for

    made: list[Loading] = []
    for path, exported in exports:
        exporter = exporter_for(exported.format, {"dtype": exported.dtype})
        text = _loading(exporter, frozen, exported.rank, str(path))
        made.append(Loading(exported.format, exporter.words, str(path), is_made=True, text=text))
    formats = {exported.format for _, exported in exports}
    return [
        *made,
        *(
            _possible(exporter_for(one, {}), frozen, name, context)
            for one in formats_for(frozen.method)
            if one not in formats
        ),
    ]


def _possible(exporter: Format, frozen: FrozenAdapter, name: str, context: PassContext) -> Loading:
    directory = f"adapters/{name}-{exporter.name}"
    try:
        exporter.check_run(frozen, context)
    except ExportError as error:
        return Loading(exporter.name, exporter.words, directory, is_made=False, refusal=str(error))
    text = _loading(exporter, frozen, frozen.rank, directory)
    return Loading(exporter.name, exporter.words, directory, is_made=False, text=text)


def _loading(exporter: Format, frozen: FrozenAdapter, rank: int, directory: str) -> Markup:
    """Return a card's section on loading as HTML, with the directory in the place of the example's.

    A directory with other than plain characters would need quotes of each language, so it is left out.
    """
    from markdown_it import MarkdownIt

    _, _, text = exporter.card(frozen, rank).partition("\n## Loading\n")
    if re.fullmatch(r"[\w./-]+", directory):
        for place in _PLACES:
            text = text.replace(place, directory)
    html: str = MarkdownIt("commonmark", {"html": False}).render(text)
    return Markup(html)
