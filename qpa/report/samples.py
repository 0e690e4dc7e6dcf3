"""How prompts are continued before and after training, as JSON and as text that is safe to show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qpa.documents import Document, FrozenAdapter
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
    """Return a text with a mark in the place of what steers a terminal; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
