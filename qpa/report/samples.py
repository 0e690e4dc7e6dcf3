"""How prompts are continued before and after training, as JSON and as text that is safe to show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

from qpa.documents import Document, FrozenAdapter
from qpa.errors import DataError
from qpa.pipeline.pass_protocol import FileStore, newest

if TYPE_CHECKING:
    from qpa.training.continuation import Continuation


def probe_prompt(documents: Iterable[Document], files: FileStore) -> list[int]:
    """Return the tokens with which the first row of the evaluation split begins, which a run keeps.

    Raises:  DocumentError: the file is missing or damaged.
    """
    from safetensors.numpy import load_file

    tokens: list[int] = load_file(files.get(newest([*documents], FrozenAdapter).probe))["input_ids"].tolist()
    return tokens


def samples_json(samples: Iterable[Continuation]) -> list[dict[str, Any]]:
    """Return prompts and continuations by name."""
    return [{"prompt": one.prompt, "base": one.base, "adapted": one.adapted} for one in samples]


def printable(text: str) -> str:
    """Return a text with a mark in the place of what steers a terminal, or is no character of HTML.

    Line breaks and tabs stay, and a carriage return before a line break goes.
    """
    lines = text.replace("\r\n", "\n")
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(c) else c for c in lines)


def _steers(character: str) -> bool:
    return category(character) in ("Cc", "Cs") and character not in "\n\t"


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:  DataError: it is no text in UTF-8, or has no such line.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(str(path), "text in UTF-8", f"other bytes at {error.start}") from error
    if not lines:
        raise DataError(str(path), "a prompt a line", "no line with text")
    return lines
