"""The blocks of commands and of code in a page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

_REASON = re.compile(r"<!--\s*not (run|compared):\s*(.+?)\s*-->", flags=re.S)
PROGRAMS = ("qpa", "make", "pip", "python", "accelerate", "torchrun", "vllm", "tensorboard")
"""What an indented block begins with where it holds commands."""


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Args:    language: "sh", "python", "console" and others.
             text: what is in it.
             line: of the page, from 1, on which the text begins.
             reason: why it cannot be run here, as the comment `<!-- not run: .. -->` before it says, or "".
             is_compared: whether what it shows of outputs is what its commands print wherever they run; a
             comment `<!-- not compared: .. -->` says why it is not.
    """

    language: str
    text: str
    line: int
    reason: str = ""
    is_compared: bool = True

    def commands(self) -> Iterator[tuple[list[str], str]]:
        """Yield the words of every command, and what it prints where the block shows that."""
        if self.language == "console":
            for part in re.split(r"^\$ ", self.text, flags=re.M)[1:]:
                line, _, output = _joined(part).partition("\n")
                yield shlex.split(line, comments=True), output
            return
        for line in _joined(self.text).splitlines():
            if words := shlex.split(line, comments=True):
                yield words, ""


def read_blocks(page: Path) -> list[Block]:
    """Return all blocks of a page that hold commands or code, in their order."""
    found: list[Block] = []
    why = None
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block":
            why = _REASON.search(token.content)
            continue
        if token.type in ("fence", "code_block") and token.map is not None:
            language = token.info.strip() if token.type == "fence" else _indented(token.content)
            line = token.map[0] + (2 if token.type == "fence" else 1)
            reason = " ".join(why[2].split()) if why and why[1] == "run" else ""
            found.append(Block(language, token.content, line, reason, not (why and why[1] == "compared")))
        why = None
    return found


def shape(text: str) -> str:
    """Return a text with its numbers and its spacing made equal: what stays the same from run to run."""
    return " ".join(re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", text).split())


def _joined(text: str) -> str:
    return text.replace("\\\n", " ")


def _indented(text: str) -> str:
    words = text.split()
    return "sh" if words and words[0] in PROGRAMS else "text"
