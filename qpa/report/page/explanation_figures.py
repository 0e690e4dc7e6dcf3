"""The figures of an explanation: contributions with intervals, and where a state's probability went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from qpa.documents import Contribution, DirectionShare, ExplainedPart, Explanation, PlaceShare
from qpa.report.explanation import PARTS_HEADER, part_row, share_text
from qpa.report.page.parts import Figure, Table
from qpa.report.page.plots import Interval, Series, heat_map, interval_plot, line_plot, nice_axis
from qpa.report.rows import Rows

CAPTIONS = {
    ("circuit", "control", "decoder"): (
        "Circuits and decoders",
        "At its start: every chunk has the feature from before the first step. All alike: the mean of its "
        "group. Without a decoder: weights of zero. In another order: chunks exchange their features.",
    ),
    ("directions",): (
        "Directions in which the loss fell",
        "Without one: a coefficient of zero in every module. In another order: exchanged within each module.",
    ),
    ("qubit",): (
        "Qubits",
        "Without one: its bit is a coin's. In another order: its bit is flipped. Basis states that stand for "
        "nothing take part in both.",
    ),
    ("layer",): (
        "Layers of the model",
        "Without one: its part of the adapter is as it started. In another order: layers exchange features.",
    ),
    ("module type",): ("Module types", "Without one: its part of the adapter is as it started."),
    ("role",): ("Roles of tensors", "Without one: these tensors of all modules are as they started."),
}
"""The titles and captions of figures of contributions, by the kinds of parts that they show."""

MARKS = (
    "In the pictures a bar is what the loss rises by without the part, a dot what it rises by with the "
    "part's values in another order, and lines are the intervals."
)


def explanation_figures(found: Explanation) -> list[Figure]:
    """Return a figure for each sort of parts, and for one state those of where its probability went."""
    return [*_contributions(found), *_shares(found)]


def _contributions(found: Explanation) -> Iterator[Figure]:
    for kinds, (title, words) in CAPTIONS.items():
        parts = [part for part in found.parts if part.kind in kinds]
        if parts:
            yield _contribution_figure(title, words, parts, found)


def _contribution_figure(
    title: str, words: str, parts: Sequence[ExplainedPart], found: Explanation
) -> Figure:
    every = [one for part in parts for one in (part.ablation, part.permutation) if one is not None]
    ends = [end for one in every for end in (one.low, one.high)]
    axis = nice_axis("rise of the loss", [0.0, *ends])
    shown = [
        (part.name, _interval(part.ablation, "adapted"), _interval(part.permutation, "evaluated"))
        for part in parts
    ]
    rows = [part_row(part, found) for part in parts]
    svg = Markup(interval_plot(title, axis, shown))
    return Figure(title, svg, f"{title}. {words}", Table(title, PARTS_HEADER, rows))


def _interval(found: Contribution | None, style: str) -> Interval | None:
    return None if found is None else Interval(found.value, found.low, found.high, style)


def _shares(found: Explanation) -> Iterator[Figure]:
    """Yield maps of layers by module types, and the shares of the directions."""
    if not found.places:
        return
    if found.unused is not None:
        title = "Probability by layer and module type"
        words = f"{title}; {share_text(found.unused)} is of basis states that stand for nothing."
        yield _map(title, words, found.places, lambda one: one.probability)
    title = "Squared coefficients by layer and module type"
    yield _map(title, f"{title}: how much of the change of the weights is where.", found.places, _squared)
    if len(found.directions) > 1:
        yield _direction_figure(found.directions)


def _squared(place: PlaceShare) -> float | None:
    return place.squared


def _map(
    title: str, words: str, places: Sequence[PlaceShare], share_of: Callable[[PlaceShare], float | None]
) -> Figure:
    layers = sorted({place.layer for place in places}, key=lambda layer: -1 if layer is None else layer)
    types = list(dict.fromkeys(place.module_type for place in places))
    at = {(place.layer, place.module_type): share_of(place) for place in places}
    columns = ["-" if layer is None else str(layer) for layer in layers]
    rows = [(name, [at.get((layer, name)) for layer in layers]) for name in types]
    table: Rows = [(name, *(share_text(share) for share in shares)) for name, shares in rows]
    return Figure(
        title, Markup(heat_map(title, columns, rows)), words, Table(title, ("layer", *columns), table)
    )


def _direction_figure(directions: Sequence[DirectionShare]) -> Figure:
    title = "Shares of the directions, the steepest first"
    series = [
        Series("squared coefficients", "adapted", tuple((one.number, one.squared) for one in directions))
    ]
    known = [(one.number, one.probability) for one in directions if one.probability is not None]
    if known:
        series.append(Series("probability", "evaluated", tuple(known)))
    values = [value for one in series for _, value in one.points]
    x = nice_axis("direction", [1, len(directions)], whole=True)
    y = nice_axis("share", values, from_zero=True)
    rows: Rows = [
        (str(one.number), share_text(one.probability), share_text(one.squared)) for one in directions
    ]
    table = Table(title, ("direction", "probability", "squared coefficients"), rows)
    return Figure(title, Markup(line_plot(title, x, y, series)), f"{title}.", table)
