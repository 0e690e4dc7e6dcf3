"""Plots: places in percent are those of the numbers, ticks are round, and names are escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpa.report.page.plots import (
    MAX_WRITTEN,
    Axis,
    Interval,
    Series,
    bars,
    heat_map,
    histogram,
    interval_plot,
    line_plot,
    nice_axis,
)

NUMBERS = st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6)


def found(svg: str, tag: str, style: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter(tag) if e.get("class") == style]


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_an_axis_holds_its_numbers_between_a_few_round_ticks(values: list[float]) -> None:
    axis = nice_axis("x", values)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert all(-1e-6 <= axis.percent(value) <= 100 + 1e-6 for value in values)
    assert 2 <= len(axis.ticks) <= 8
    assert len({axis.write(tick) for tick in axis.ticks}) == len(axis.ticks)


@pytest.mark.parametrize(
    ("values", "ticks", "high"),
    [
        ([0, 305], ["0", "100", "200", "300"], 305),
        ([0, 3], ["0", "1", "2", "3"], 3),
        ([0, 20], ["0", "5", "10", "15", "20"], 20),
    ],
)
def test_steps_are_whole_and_the_axis_ends_with_the_last(values, ticks, high) -> None:
    axis = nice_axis("step", values, whole=True)
    assert [axis.write(tick) for tick in axis.ticks] == ticks and axis.high == high


def test_lines_go_through_their_points_and_names_do_not_meet() -> None:
    axis = Axis("x", 0, 10, (0, 10), "{:g}".format)
    series = [
        Series("high <b>", "evaluated", ((0, 10), (10, 5.1)), marked=True),
        Series("low", "adapted", ((0, 0), (5, 2.5), (10, 5))),
    ]
    svg = line_plot("loss & co", axis, axis, series)
    (line,) = found(svg, "polyline", "line adapted")
    assert line.get("points") == "0.0,1000.0 500.0,750.0 1000.0,500.0"
    dots = [(dot.get("cx"), dot.get("cy")) for dot in found(svg, "circle", "dot evaluated")]
    assert dots == [("0.00%", "0.00%"), ("100.00%", "49.00%")]
    (high,) = found(svg, "text", "label end evaluated")
    (low,) = found(svg, "text", "label end adapted")
    assert float(str(high.get("dy"))) < 0 < float(str(low.get("dy")))
    assert ElementTree.fromstring(svg).get("aria-label") == "loss & co" and high.text == "high <b>"


def test_bars_are_as_long_as_their_numbers() -> None:
    axis = Axis("weight", -1, 1, (-1, 1), "{:g}".format)
    found_bars = found(histogram("weights", axis, [0, 4, 2, 0]), "rect", "bar adapted")
    assert [bar.get("x") for bar in found_bars] == ["25.000%", "50.000%"]
    heights = [float(str(bar.get("height")).rstrip("%")) for bar in found_bars]
    assert heights[0] == 100 and math.isclose(heights[1], 50)
    rows = [("few", 1.0, "1", "adapted"), ("many", 4.0, "4", "base")]
    (few,) = found(bars("account", rows), "rect", "bar adapted")
    assert few.get("width") == "25.00%"


def test_intervals_are_bars_from_zero_and_dots_with_lines_between_their_ends() -> None:
    axis = nice_axis("rise", [-1.0, 3.0])
    rows = [
        ("a & b", Interval(2.0, 1.0, 3.0, "adapted"), Interval(1.0, 0.0, 2.0, "evaluated")),
        ("below", Interval(-0.5, -1.0, 0.0, "adapted"), None),
    ]
    svg = interval_plot("what", axis, rows)
    above, below = found(svg, "rect", "bar adapted")
    zero = axis.percent(0)
    assert (above.get("x"), above.get("width")) == (f"{zero:.2f}%", f"{axis.percent(2) - zero:.2f}%")
    assert below.get("x") == f"{axis.percent(-0.5):.2f}%"
    (dot,) = found(svg, "circle", "dot evaluated")
    assert dot.get("cx") == f"{axis.percent(1.0):.2f}%"
    ends = [(line.get("x1"), line.get("x2")) for line in found(svg, "line", "whisker")]
    assert (f"{axis.percent(1.0):.2f}%", f"{axis.percent(3.0):.2f}%") in ends and len(ends) == 3
    assert [text.text for text in found(svg, "text", "label")] == ["a & b", "below"]


@pytest.mark.parametrize("n_columns", [3, MAX_WRITTEN + 1])
def test_a_heat_map_is_darkest_at_its_largest_share_and_blank_where_there_is_none(n_columns: int) -> None:
    shares = [0.5, 0.25, *[None] * (n_columns - 2)]
    svg = heat_map("what", [str(index) for index in range(n_columns)], [("q<", shares)])
    assert [cell.get("fill-opacity") for cell in found(svg, "rect", "bar adapted")] == ["1.000", "0.500"]
    written = [text.text for text in found(svg, "text", "cell mid")]
    assert written == (["50.0 %", "25.0 %"] if n_columns <= MAX_WRITTEN else [])
    assert [text.text for text in found(svg, "text", "label")] == ["q<"]
