"""Why a document would be made again: what it was made from is no longer what a configuration says.

A document says of itself which options and which seed made it, and from which documents. An option that it
does not know is newer than it, and counts as left at its default. The version of qpa that made it does not
count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qpa.documents import Attachment, Document, Provenance, Record
from qpa.errors import DocumentError
from qpa.pipeline.options import options_of
from qpa.pipeline.pass_protocol import recorded_options
from qpa.store.run_directory import DirectoryStore


def changed_options(recorded: Provenance, maker: Any, seed: int) -> list[str]:
    """Return in words which options of a pass or exporter are not those that a document was made with.

    Args:    maker: with the options of now.
    """
    before = recorded.option_values
    words = [] if recorded.seed == seed else [f"seed {recorded.seed} -> {seed}"]
    now = {one.name: one.value for one in recorded_options(maker)}
    for one in options_of(type(maker)):
        if one.field in now:
            old = before.get(one.field, one.default)
            if old != now[one.field]:
                words.append(f"{one.key} {_word(old)} -> {_word(now[one.field])}")
    return words


def missing_file(document: Document, files: DirectoryStore) -> str | None:
    """Return in words which file that a document names is gone or has another length."""
    for attachment in attachments_of(document):
        try:
            files.path_of(attachment)
        except DocumentError as error:
            return f"{error.subject} is gone" if error.found == "nothing" else f"{error.subject} is damaged"
    return None


def attachments_of(record: Record) -> Iterable[Attachment]:
    """Yield the files that a document names, wherever in it they stand."""
    for name in type(record).model_fields:
        value = getattr(record, name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Attachment):
                yield one
            elif isinstance(one, Record):
                yield from attachments_of(one)


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "default" if value is None else str(value)
