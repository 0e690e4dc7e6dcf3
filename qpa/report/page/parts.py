"""What a page consists of: tables, figures and drawings, as the template shows them."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from qpa.report.rows import Rows


@dataclass(frozen=True)
class Table:
    """A table with a header; title says what it is to those who do not see it."""

    title: str
    header: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True)
class Figure:
    """A picture, what it shows, and its numbers.

    Args:    svg: markup of our own, in which every text is escaped.
    """

    title: str
    svg: Markup
    caption: str
    numbers: Table | None = None
