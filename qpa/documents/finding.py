"""A broken rule of a contract, as the check of a directory reports it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule.

    Args:    rule: the name of the rule, such as "L01", see `qpa.exporters.contracts`.
             subject: the file, config field or tensor; the first one where there are several.
    """

    rule: str
    subject: str
    expected: str
    found: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"{self.rule} {self.subject}: expected {self.expected}, found {self.found}"


def several(names: Iterable[str]) -> str:
    """Return the first name and how many others there are."""
    first, *others = names
    return short(first) + (f" and {len(others)} more" if others else "")


def short(value: object) -> str:
    """Return a value as at most 120 printable characters in one line, whatever it holds."""
    text = " ".join("".join(c if c.isprintable() else "?" for c in str(value)[:400]).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
