"""A broken rule of a contract, as the check of a directory reports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule.

    Args:    rule: "L01" and following, see `qpa.exporters.contracts`.
             subject: the file, config field or tensor; the first one where there are several.
    """

    rule: str
    subject: str
    expected: str
    found: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"{self.rule} {self.subject}: expected {self.expected}, found {self.found}"
