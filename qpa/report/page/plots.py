"""Plots as SVG that stands in a page: text of one size however wide the page is, colours of the page.

The SVG is the plot's area, as wide as its place in the page less the margins that the page's CSS leaves for
labels. Places are in percent of the area; lines are in an inner SVG that is stretched over it, with strokes
that are not. Classes name what is drawn, and the CSS colours it, in a light and in a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

LEFT = 52
"""Pixels at the left of an area for labels, as in the CSS."""

N_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to percent of an area.

    Args:    low, high: the ends.
             ticks: numbers that get a label.
             write: writes a tick's label.
    """

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    write: Callable[[float], str]

    def percent(self, value: float) -> float:
        """Return where a number is, 0 at the low end."""
        return 100 * (value - self.low) / ((self.high - self.low) or 1)


@dataclass(frozen=True)
class Series:
    """Points of a line plot, from left to right.

    Args:    name: stands at the last point.
             style: class of the line, which the page's CSS knows.
             marked: draw each point.
    """

    name: str
    style: str
    points: tuple[tuple[float, float], ...]
    marked: bool = False


def nice_axis(label: str, values: Sequence[float], *, whole: bool = False, from_zero: bool = False) -> Axis:
    """Return an axis around some numbers, with ticks at round ones.

    Args:    values: finite, at least one.
             whole: ticks are whole numbers.
             from_zero: the axis begins at 0, and ends at the largest number.
    """
    low, high = (0.0 if from_zero else min(values)), max(values)
    step = _round_step((high - low) / N_TICKS or abs(high) / N_TICKS or 1.0)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.ceil(high / step)
    if last == first:
        last += 1
    ticks = tuple(step * n for n in range(first, last + 1))
    n_digits = max(0, -math.floor(math.log10(step) + 1e-9))
    end = high if whole and high > ticks[0] else ticks[-1]
    shown = tuple(tick for tick in ticks if tick <= end)
    return Axis(label, ticks[0], end, shown, lambda value: f"{value + 0.0:,.{n_digits}f}")


def _round_step(step: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def line_plot(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return lines over an area, each named where it ends."""
    parts = [*_grid(x, y)]
    highest = max((one.points[-1][1] for one in series), default=0)
    for one in series:
        if len(one.points) > 1:
            path = " ".join(f"{10 * x.percent(a):.1f},{1000 - 10 * y.percent(b):.1f}" for a, b in one.points)
            parts.append(_stretched(f'<polyline class="line {one.style}" points="{path}"/>'))
        if one.marked:
            parts += [_dot(x.percent(a), 100 - y.percent(b), one.style) for a, b in one.points]
        if one.name:
            a, b = one.points[-1]
            parts.append(_label(x.percent(a), 100 - y.percent(b), one, is_below=b < highest))
    return _plot(title, parts, x.label, y.label)


def histogram(title: str, x: Axis, counts: Sequence[int], *, style: str = "adapted") -> str:
    """Return bars over an axis that they divide evenly."""
    y = nice_axis("count", counts, whole=True, from_zero=True)
    width = 100 / len(counts)
    bars = [
        f'<rect class="bar {style}" x="{index * width:.3f}%" y="{100 - y.percent(count):.2f}%" '
        f'width="{0.9 * width:.3f}%" height="{y.percent(count):.2f}%"/>'
        for index, count in enumerate(counts)
        if count
    ]
    return _plot(title, [*_grid(x, y), *bars], x.label, y.label, height=150)


def bars(title: str, rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Return horizontal bars in proportion, with their names above and their numbers beside them.

    Args:    rows: name, number, the number as text, and style.
    """
    top = max(value for _, value, _, _ in rows) or 1.0
    parts = []
    for index, (name, value, text, style) in enumerate(rows):
        y = 48 * index
        width = 100 * value / top
        parts.append(f'<text class="label" x="0" y="{y + 13}">{escape(name)}</text>')
        parts.append(f'<text class="label end" x="100%" y="{y + 13}">{escape(text)}</text>')
        parts.append(f'<rect class="track" x="0" y="{y + 20}" width="100%" height="12"/>')
        parts.append(
            f'<rect class="bar {style}" x="0" y="{y + 20}" width="{max(width, 0.3):.2f}%" height="12"/>'
        )
    return _svg("plot", title, 48 * len(rows) - 12, "".join(parts))


@dataclass(frozen=True)
class Interval:
    """A number between two others.

    Args:    style: class of its bar or dot, which the page's CSS knows.
    """

    value: float
    low: float
    high: float
    style: str


def interval_plot(title: str, x: Axis, rows: Sequence[tuple[str, Interval | None, Interval | None]]) -> str:
    """Return rows of numbers with intervals over one axis, with their names above.

    Args:    rows: name, what is drawn as a bar from zero, and what is drawn as a dot.
    """
    height = 40 * len(rows)
    parts = []
    for tick in x.ticks:
        at = f"{x.percent(tick):.2f}%"
        style = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{style}" x1="{at}" x2="{at}" y1="0" y2="{height}"/>')
        parts.append(f'<text class="tick mid" x="{at}" y="{height}" dy="17">{escape(x.write(tick))}</text>')
    for index, (name, bar, dot) in enumerate(rows):
        y = 40 * index
        parts.append(f'<text class="label" x="0" y="{y + 13}">{escape(name)}</text>')
        if bar is not None:
            left, right = sorted((x.percent(0), x.percent(bar.value)))
            place = f'x="{left:.2f}%" width="{right - left:.2f}%" y="{y + 19}" height="9"'
            parts.append(f'<rect class="bar {bar.style}" {place}/>')
            parts.append(_whisker(x, bar, y + 23.5))
        if dot is not None:
            parts.append(_whisker(x, dot, y + 32))
            parts.append(
                f'<circle class="dot {dot.style}" cx="{x.percent(dot.value):.2f}%" cy="{y + 32}" r="4"/>'
            )
    label = f'<text class="label mid" x="50%" y="{height + 34}">{escape(x.label)}</text>'
    return _svg("plot area", title, height, "".join([*parts, label]))


def _whisker(x: Axis, found: Interval, y: float) -> str:
    low, high = x.percent(found.low), x.percent(found.high)
    return f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'


MAX_WRITTEN = 10
"""The most columns of a heat map with room for numbers."""


def heat_map(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Return a table of shares as squares, the darker the larger; None is left blank.

    Args:    rows: a name, and a share for each column.
    """
    top = max((share for _, shares in rows for share in shares if share is not None), default=0.0) or 1.0
    width = 76 / len(columns)
    parts = []
    every = max(1, -(-len(columns) // MAX_WRITTEN))
    for index, name in enumerate(columns[::every]):
        at = 24 + width * (every * index + 0.5)
        parts.append(f'<text class="tick mid" x="{at:.2f}%" y="12">{escape(name)}</text>')
    for row, (name, shares) in enumerate(rows):
        y = 20 + 28 * row
        parts.append(f'<text class="label" x="0" y="{y + 18}">{escape(name)}</text>')
        for column, share in enumerate(shares):
            if share is None:
                continue
            at = 24 + width * column
            place = f'x="{at:.2f}%" y="{y}" width="{0.96 * width:.2f}%" height="26"'
            parts.append(f'<rect class="track" {place}/>')
            parts.append(f'<rect class="bar adapted" {place} fill-opacity="{share / top:.3f}"/>')
            if len(columns) <= MAX_WRITTEN:
                text = f"{100 * share:.1f} %"
                parts.append(f'<text class="cell mid" x="{at + width / 2:.2f}%" y="{y + 17}">{text}</text>')
    return _svg("plot", title, 20 + 28 * len(rows), "".join(parts))


def _plot(title: str, parts: Sequence[str], x_label: str, y_label: str, height: int = 200) -> str:
    """Return an area with what is in it, and the labels of its axes."""
    labels = (
        f'<text class="label" x="-{LEFT}" y="-11">{escape(y_label)}</text>'
        f'<text class="label mid" x="50%" y="{height + 34}">{escape(x_label)}</text>'
    )
    return _svg("plot area", title, height, labels + "".join(parts))


def _svg(style: str, title: str, height: int, content: str) -> str:
    return f'<svg class="{style}" role="img" aria-label="{escape(title)}" height="{height}">{content}</svg>'


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for tick in y.ticks:
        at = f"{100 - y.percent(tick):.2f}%"
        yield f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        yield f'<text class="tick end" x="-8" y="{at}" dy="4">{escape(y.write(tick))}</text>'
    for tick in x.ticks:
        at = f"{x.percent(tick):.2f}%"
        yield f'<text class="tick mid" x="{at}" y="100%" dy="17">{escape(x.write(tick))}</text>'
    yield '<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'


def _stretched(content: str) -> str:
    box = 'width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible"'
    return f"<svg {box}>{content}</svg>"


def _dot(x: float, y: float, style: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.2f}%" cy="{y:.2f}%" r="4"/>'


def _label(x: float, y: float, series: Series, *, is_below: bool) -> str:
    """Return a series' name at a point: to its left where the point is in the right half of the area."""
    side, dx = ("end", 0) if x > 50 else ("", 8)
    dy = 20 if is_below else -12
    place = f'x="{x:.2f}%" y="{y:.2f}%" dx="{dx}" dy="{dy}"'
    return f'<text class="label {side} {series.style}" {place}>{escape(series.name)}</text>'
