"""What the parts of a run contribute, as rows for tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qpa.documents import (
    Contribution,
    DirectionShare,
    Document,
    ExplainedPart,
    Explanation,
    PlaceShare,
    TrainedGenerator,
    WeightLayout,
)
from qpa.explanation.adapter_parts import band_name, bands
from qpa.explanation.contributions import LEVEL
from qpa.explanation.parts import left_out
from qpa.pipeline.pass_protocol import newest
from qpa.report.page.parts import Table
from qpa.report.rows import Rows, number

PARTS_HEADER = ("part", "without it", "share", "in another order")
SHARES_HEADER = ("", "probability", "squared coefficients")


def cost_line(n_rows: int | None, documents: Sequence[Document], n_evaluations: int) -> str:
    """Return what an explanation will cost, before it is made.

    Args:    n_rows: as asked for; None for all of the evaluation split.
    """
    n_tokens = newest(documents, TrainedGenerator).result.n_eval_tokens
    what = f"{number(n_tokens)} tokens" if n_rows is None else f"up to {number(n_rows)} rows"
    return f"scores the evaluation split, {what}, {number(n_evaluations)} times"


def explanation_tables(documents: Sequence[Document]) -> list[Table]:
    """Return the tables of a run's explanation: its parts, and of one state where the probability went."""
    found = newest(documents, Explanation)
    tables = [Table(parts_title(found), PARTS_HEADER, parts_rows(found))]
    if found.places:
        tables.append(Table(shares_title(found), SHARES_HEADER, shares_rows(found)))
    return tables


def what_is_left_out(documents: Sequence[Document]) -> list[str]:
    """Return in a sentence what of a run's generator is not explained; nothing where all is."""
    return list(filter(None, [left_out(newest(documents, WeightLayout))]))


def parts_title(found: Explanation) -> str:
    """Return what the table of parts shows."""
    before, after = f"{found.base_loss:.4f} at the start", f"{found.trained_loss:.4f} as trained"
    rise = f"what it rises by without a part, with intervals of {LEVEL:.0%} over rows"
    return f"loss {before}, {after}, on {number(found.n_rows)} rows; {rise}"


def parts_rows(found: Explanation) -> Rows:
    """Return the contributions, kind by kind, under the words of `PARTS_HEADER`."""
    whole = _whole_percent(share_of_gain(found.gain, found))
    everything = ("all together", contribution_text(found.gain), whole, "")
    return [everything, *(part_row(part, found) for part in found.parts)]


def part_row(part: ExplainedPart, found: Explanation) -> tuple[str, ...]:
    """Return the contributions of one part, under the words of `PARTS_HEADER`."""
    of_gain = _whole_percent(share_of_gain(part.ablation, found))
    return part.name, contribution_text(part.ablation), of_gain, contribution_text(part.permutation)


def _whole_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share + 0.0:.0f} %"


def contribution_text(found: Contribution | None) -> str:
    """Write a contribution with its interval; "" for none."""
    return "" if found is None else f"{found.value:+.3f} [{found.low:.3f}, {found.high:.3f}]"


def share_of_gain(found: Contribution | None, explanation: Explanation) -> float | None:
    """Return a contribution over what all parts contribute together; None where either is nothing."""
    gain = explanation.gain.value
    return found.value / gain if found is not None and gain else None


def shares_title(found: Explanation) -> str:
    """Return what the table of shares shows."""
    if found.unused is None:
        return "where the coefficients went: shares of their squares"
    return f"where the state's probability went; {found.unused:.1%} is of basis states that stand for nothing"


def shares_rows(found: Explanation) -> Rows:
    """Return the shares of layers, module types and bands of directions, under `SHARES_HEADER`."""
    return [
        *_sums(found.places, lambda place: "no layer" if place.layer is None else f"layer {place.layer}"),
        *_sums(found.places, lambda place: place.module_type),
        *_band_rows(found.directions),
    ]


def _band_rows(directions: Sequence[DirectionShare]) -> Iterator[tuple[str, ...]]:
    for first, last in bands(len(directions)):
        band = directions[first:last]
        probabilities = [one.probability for one in band if one.probability is not None]
        probability = sum(probabilities) if probabilities else None
        yield band_name(first, last), share_text(probability), share_text(sum(one.squared for one in band))


def _sums(places: Iterable[PlaceShare], name_of: Callable[[PlaceShare], str]) -> Rows:
    sums: dict[str, list[list[float]]] = {}
    for place in places:
        probability, squared = sums.setdefault(name_of(place), [[], []])
        probability += [] if place.probability is None else [place.probability]
        squared += [] if place.squared is None else [place.squared]
    return [
        (name, *(share_text(sum(values)) if values else "" for values in found))
        for name, found in sums.items()
    ]


def share_text(share: float | None) -> str:
    """Write a share in percent; "" for none."""
    return "" if share is None else f"{100 * share:.1f} %"


def explanation_json(found: Explanation) -> dict[str, Any]:
    """Return an explanation by name, each ablation with its share of the gain."""
    content = found.model_dump(exclude={"provenance"})
    for part, shown in zip(found.parts, content["parts"], strict=True):
        shown["share_of_gain"] = share_of_gain(part.ablation, found)
    return content
