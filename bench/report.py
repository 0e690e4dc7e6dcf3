"""From results.jsonl to a table, a plot, and each method's loss at the same number of trained parameters."""

from __future__ import annotations

import bisect
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from qpa.bench.ledger import FILE_NAME, Line, read_lines
from qpa.bench.sizes import MAX_SIZE_RATIO, size_ratio
from qpa.errors import DataError
from qpa.store.atomic_files import write_file

OURS = "qpa"
EQUAL_SIZE = 0.01
"""Sizes that differ by no more count as equal."""
TABLE, PLOT = "table.md", "loss.png"
Frontier = Sequence[tuple[int, float]]
_NONE = "-"


@dataclass(frozen=True)
class Row:
    """A method at one size, over its seeds at its best rate.

    Args:    n_trained: counted from the optimizer.
             mean, deviation: of the test loss, nats per token; mean None where a seed diverged, deviation
             (n - 1) None below two seeds.
             search: (rate, validation loss of seed 0), ascending; None where it diverged.
             at_edge: the best rate is the search's smallest or largest.
             train_s, peak_mb: mean and largest over the seeds.
    """

    method: str
    label: str
    n_trained: int
    rate: float
    search: tuple[tuple[float, float | None], ...]
    at_edge: bool
    n_seeds: int
    mean: float | None
    deviation: float | None
    train_s: float
    peak_mb: float | None
    file_bytes: int
    exports_to_lora: bool


class Unmet(NamedTuple):
    """A budget that a method cannot meet, with the size it has nearest to it; 0 where it has none."""

    method: str
    budget: str
    n_nearest: int


@dataclass(frozen=True)
class Results:
    """What a report shows.

    Args:    rows: by method in the order they were run, then size.
             budgets: trained parameters of each, by how the user wrote it.
             base_loss: test loss of the base model.
    """

    rows: tuple[Row, ...]
    budgets: dict[str, int]
    unmet: tuple[Unmet, ...]
    base_loss: float | None


def interpolate(frontier: Frontier, n_trained: int) -> float | None:
    """Return the loss at a size, linear in log(parameters) between two sizes; None outside their range.

    Args:    frontier: (trained parameters, loss), ascending.
    """
    sizes = [size for size, _ in frontier]
    index = bisect.bisect_left(sizes, n_trained)
    if index < len(sizes) and sizes[index] == n_trained:
        return frontier[index][1]
    if index in (0, len(sizes)):
        return None
    (n_low, low), (n_high, high) = frontier[index - 1], frontier[index]
    share = math.log(n_trained / n_low) / math.log(n_high / n_low)
    return low + share * (high - low)


def best_with_at_most(frontier: Frontier, n_trained: int) -> float | None:
    """Return the loss a method reaches with a number of parameters or fewer; None below its smallest size.

    Beyond its largest size, that size's loss holds.

    Args:    frontier: (trained parameters, loss), ascending.
    """
    if frontier and n_trained > frontier[-1][0]:
        return frontier[-1][1]
    return interpolate(frontier, n_trained)


def frontier_of(rows: Sequence[Row], method: str) -> Frontier:
    """Return a method's (trained parameters, mean test loss), ascending, with one loss for each size."""
    best: dict[int, float] = {}
    for row in rows:
        if row.method == method and row.mean is not None:
            best[row.n_trained] = min(row.mean, best.get(row.n_trained, math.inf))
    return sorted(best.items())


def read_results(directories: Sequence[Path]) -> Results:
    """Read and sum up the results of one or more benches of the same setting.

    Raises:  DataError: a file is missing, broken or without runs, or the settings differ.
    """
    lines = [line for directory in directories for line in read_lines(directory / FILE_NAME)]
    if any(line["setting"] != lines[0]["setting"] for line in lines):
        raise DataError(str(directories[-1]), f"results of {directories[0]}'s setting", "another setting")
    cells: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "run":
            cells[line["method"], line["label"]].append(line)
    if not cells:
        raise DataError(str(directories[0] / FILE_NAME), "at least one run", "none")
    order = list(dict.fromkeys(method for method, _ in cells))
    rows = (_row(method, label, runs) for (method, label), runs in cells.items())
    bases = [line["test"] for line in lines if line["kind"] == "base"]
    return Results(
        tuple(sorted(rows, key=lambda row: (order.index(row.method), row.n_trained))),
        {line["budget"]: line["n_trained"] for line in lines if line["kind"] == "budget"},
        tuple(
            Unmet(line["method"], line["budget"], line["n_trained"])
            for line in {(x["method"], x["budget"]): x for x in lines if x["kind"] == "unmet"}.values()
        ),
        bases[0] if bases else None,
    )


def _row(method: str, label: str, runs: list[Line]) -> Row:
    search = [run for run in runs if run["seed"] == 0] or runs
    best = min(search, key=lambda run: math.inf if run["validation"] is None else run["validation"])
    rates = sorted({run["rate"] for run in search})
    chosen = [run for run in runs if run["rate"] == best["rate"]]
    tests = [run["test"] for run in chosen if run["test"] is not None]
    peaks = [run["peak_mb"] for run in chosen if run["peak_mb"] is not None]
    complete = len(tests) == len(chosen)
    return Row(
        method=method,
        label=label,
        n_trained=best["n_trained"],
        rate=best["rate"],
        search=tuple(sorted((run["rate"], run["validation"]) for run in search)),
        at_edge=best["rate"] in (rates[0], rates[-1]),
        n_seeds=len(chosen),
        mean=statistics.mean(tests) if complete else None,
        deviation=statistics.stdev(tests) if complete and len(tests) > 1 else None,
        train_s=statistics.mean(run["train_s"] for run in chosen),
        peak_mb=max(peaks, default=None),
        file_bytes=best["file_bytes"],
        exports_to_lora=best["exports_to_lora"],
    )


def write_report(directories: Sequence[Path], out: Path) -> str:
    """Write OUT/table.md and OUT/loss.png; return the table as text.

    Raises:  DataError: there are no results, or they do not belong together.
             DiskFullError: there is no room for one of the files.
    """
    results = read_results(directories)
    write_file(out / PLOT, draw(results))
    text = f"{markdown_table(_table(results))}\n\n{_notes(results)}\n"
    for title, note, rows in (
        ("Learning rates", _SEARCH_NOTE, _search_table(results)),
        ("Frontier", _FRONTIER_NOTE, _frontier_table(results)),
    ):
        text += f"\n## {title}\n\n{note}\n\n{markdown_table(rows)}\n"
    if any(row.method == OURS for row in results.rows):
        differences = markdown_table(_difference_table(results))
        text += f"\n## Against {OURS}\n\n{_DIFFERENCE_NOTE}\n\n{differences}\n"
    write_file(out / TABLE, f"# qpa bench\n\n![]({PLOT})\n\n{text}".encode())
    return text


_FRONTIER_NOTE = (
    "Test loss at the same number of trained parameters, linear in log(parameters) between two sizes.\n"
    "< is a method's largest size, which is smaller than the budget; > its smallest, which is larger and\n"
    "serves the budget, but does not count as best."
)


_SEARCH_NOTE = "Validation loss of seed 0 at each rate, nats per token."


def _search_table(results: Results) -> list[tuple[str, ...]]:
    rates = sorted({rate for row in results.rows for rate, _ in row.search})
    table: list[tuple[str, ...]] = [("method", "trained", *(f"{rate:g}" for rate in rates))]
    for row in results.rows:
        found = {rate: "diverged" if loss is None else f"{loss:.4f}" for rate, loss in row.search}
        table.append((row.method, f"{row.n_trained:,}", *(found.get(rate, _NONE) for rate in rates)))
    return table


_DIFFERENCE_NOTE = (
    f"Test loss less that of {OURS} at its own sizes: positive where {OURS} is better. A method stands with\n"
    "at most as many parameters, and one percent more, interpolated as above; - is too far from its sizes."
)


def _difference_table(results: Results) -> list[tuple[str, ...]]:
    ours = [row for row in results.rows if row.method == OURS and row.mean is not None]
    table: list[tuple[str, ...]] = [("method", *(f"{row.n_trained:,}" for row in ours))]
    for method in dict.fromkeys(row.method for row in results.rows if row.method != OURS):
        frontier = frontier_of(results.rows, method)
        table.append((method, *(_difference(frontier, row) for row in ours)))
    return table


def _difference(frontier: Frontier, ours: Row) -> str:
    if not frontier or ours.n_trained > MAX_SIZE_RATIO * frontier[-1][0]:
        return _NONE
    loss = best_with_at_most(frontier, round(ours.n_trained * (1 + EQUAL_SIZE)))
    return _NONE if loss is None or ours.mean is None else f"{loss - ours.mean:+.4f}"


def _served(results: Results, row: Row) -> list[str]:
    """Return the budgets that a row is its method's nearest size to, within the bench's tolerance."""
    peers = [other for other in results.rows if other.method == row.method]
    return [
        text
        for text, n in results.budgets.items()
        if size_ratio(row.n_trained, n) <= MAX_SIZE_RATIO
        and row is min(peers, key=lambda peer: size_ratio(peer.n_trained, n))
    ]


def _table(results: Results) -> list[tuple[str, ...]]:
    header = ("method", "size", "budget", "trained", "rate", "seeds", "test loss", "sd", "perplexity")
    costs = ("train s", "peak MB", "file KB", "LoRA")
    return [header + costs, *(_cells(results, row) for row in results.rows)]


def _cells(results: Results, row: Row) -> tuple[str, ...]:
    return (
        row.method,
        row.label,
        " ".join(_served(results, row)) or _NONE,
        f"{row.n_trained:,}",
        f"{row.rate:g}" + ("*" if row.at_edge else ""),
        str(row.n_seeds),
        "diverged" if row.mean is None else f"{row.mean:.4f}",
        _NONE if row.deviation is None else f"{row.deviation:.4f}",
        _NONE if row.mean is None else f"{math.exp(min(row.mean, 700.0)):.3f}",
        f"{row.train_s:.1f}",
        _NONE if row.peak_mb is None else f"{row.peak_mb:.0f}",
        f"{row.file_bytes / 1000:.1f}",
        "yes" if row.exports_to_lora else "no",
    )


def _notes(results: Results) -> str:
    notes = [
        "Rates with * are the smallest or largest searched. LoRA: a plain LoRA of rank at most 64 carries it."
    ]
    if results.base_loss is not None:
        notes.append(f"The base model's test loss is {results.base_loss:.4f}.")
    met = {(row.method, text) for row in results.rows for text in _served(results, row)}
    for method, budget, n_nearest in results.unmet:
        if (method, budget) not in met:
            nearest = f"its nearest size is {n_nearest:,}" if n_nearest else "it has no size on this model"
            notes.append(f"{method} cannot meet {budget} ({results.budgets.get(budget, 0):,}): {nearest}.")
    return "\n".join(f"- {note}" for note in notes)


def _frontier_table(results: Results) -> list[tuple[str, ...]]:
    methods = list(dict.fromkeys(row.method for row in results.rows))
    frontiers = {method: frontier_of(results.rows, method) for method in methods}
    table: list[tuple[str, ...]] = [("budget", "parameters", *methods, "best")]
    for text, n_trained in results.budgets.items():
        found = {method: best_with_at_most(frontier, n_trained) for method, frontier in frontiers.items()}
        losses = {method: loss for method, loss in found.items() if loss is not None}
        best = min(losses, key=lambda method: losses[method]) if losses else _NONE
        cells = (_frontier_cell(frontiers[method], n_trained) for method in methods)
        table.append((text, f"{n_trained:,}", *cells, best))
    return table


def _frontier_cell(frontier: Frontier, n_trained: int) -> str:
    loss = best_with_at_most(frontier, n_trained)
    if loss is not None:
        return f"{loss:.4f}" if n_trained <= frontier[-1][0] else f"<{loss:.4f}"
    if frontier and size_ratio(frontier[0][0], n_trained) <= MAX_SIZE_RATIO:
        return f">{frontier[0][1]:.4f}"
    return _NONE


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return an aligned markdown table; the first row is the header, numbers stand right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    rule = tuple(
        "-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)
    )
    return "\n".join(_aligned(row, widths, right) for row in (rows[0], rule, *rows[1:]))


def _aligned(row: tuple[str, ...], widths: list[int], right: list[bool]) -> str:
    cells = (c.rjust(n) if r else c.ljust(n) for c, n, r in zip(row, widths, right, strict=True))
    return "| " + " | ".join(cells) + " |"


def _is_number(cell: str) -> bool:
    return cell in (_NONE, "diverged") or re.fullmatch(r"[<>+-]?[\d,.]+(e-\d+)?[*%]?", cell) is not None


def draw(results: Results) -> bytes:
    """Return a PNG of test loss over trained parameters, with a line for each method, and the base's loss."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for index, method in enumerate(dict.fromkeys(row.method for row in results.rows)):
        _draw_method(axes, [row for row in results.rows if row.method == method], method, index)
    if results.base_loss is not None:
        # Drawn to scale it would squeeze everything else into a corner.
        axes.plot([], [], color="none", label=f"base model {results.base_loss:.3f}")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="test loss, nats per token")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="both", labelrotation=30)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


_MARKERS = "osD^v<>PX*"
_N_COLORS = 10


def _draw_method(axes: Any, rows: Sequence[Row], method: str, index: int) -> None:
    """Draw one method; a mark and a line style tell methods of the same color apart."""
    shown = [(row.n_trained, row.mean, row.deviation or 0.0) for row in rows if row.mean is not None]
    if not shown:
        return
    sizes, means, deviations = zip(*shown, strict=True)
    axes.errorbar(
        sizes,
        means,
        yerr=deviations,
        label=method,
        color=f"C{index % _N_COLORS}",
        marker=_MARKERS[(index + index // _N_COLORS) % len(_MARKERS)],
        linestyle="-" if index < _N_COLORS else ":",
        markersize=4,
        linewidth=2.5 if method.startswith("qpa") else 1.2,
        capsize=2,
    )
