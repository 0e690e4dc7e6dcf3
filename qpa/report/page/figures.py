"""The figures of a page: losses, account, circuits, probabilities and weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qpa.circuits.circuit import NO_DEVICE
from qpa.documents import FrozenAdapter, LogicalCircuit, Measurement, NativeCircuit, ParameterAccount
from qpa.pipeline.pass_protocol import FileStore
from qpa.report.page.circuit_drawing import Drawing, draw_circuit
from qpa.report.page.parts import Figure, Table
from qpa.report.page.plots import Axis, Series, bars, histogram, line_plot, nice_axis
from qpa.report.rows import Rows, number, several
from qpa.store.tensor_file import TensorFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_ROWS = 40
"""Rows of a table of losses; of more, some that are evenly spread."""

N_BINS = 41

LEAST_PROBABILITY = 1e-12
"""An axis begins here where there are smaller ones."""


def loss_figure(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return the losses of a log; None where it has none."""
    trained, evaluated = _losses(log, "loss"), _losses(log, "eval_loss")
    if not trained and len(evaluated) < 2:
        return None
    points = [*trained, *evaluated]
    x = nice_axis("optimizer step", [0, *(step for step, _ in points)], whole=True)
    losses = [loss for _, loss in points]
    room = 0.1 * (max(losses) - min(losses))  # for a name below the lower line
    y = nice_axis("loss, nats per token", [min(losses) - room, max(losses)])
    series = [
        Series("training", "adapted", tuple(trained)),
        Series("evaluation", "evaluated", tuple(evaluated), marked=True),
    ]
    title = "Loss by optimizer step"
    at = {step: loss for step, loss in evaluated}
    rows: Rows = []
    for step in sorted({step for step, _ in points}):
        loss = dict(trained).get(step)
        rows.append((number(step), _text(loss), _text(at.get(step))))
    caption = "Training is the mean since the point before; evaluation is on the held-out split."
    table = Table(title, ("step", "training", "evaluation"), _spread(rows))
    return Figure(
        title, Markup(line_plot(title, x, y, [one for one in series if one.points])), caption, table
    )


def _losses(log: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    found = {line["step"]: float(line[name]) for line in log if isinstance(line.get(name), int | float)}
    return [(step, loss) for step, loss in sorted(found.items()) if math.isfinite(loss)]


def _text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _spread(rows: Rows) -> Rows:
    """Return the first row, the last, and some between."""
    if len(rows) <= MAX_ROWS:
        return rows
    return [rows[round(index * (len(rows) - 1) / (MAX_ROWS - 1))] for index in range(MAX_ROWS)]


def account_figure(account: ParameterAccount, rows: Rows, adapter: str) -> Figure:
    """Return the trained numbers beside the adapter's own.

    Args:    rows: of the account.
    """
    title = "Trained numbers beside the adapter's own"
    shown = [
        ("trained in the generator", account.n_generator, number(account.n_generator), "adapted"),
        (f"{adapter}, which they generate", account.n_adapter, number(account.n_adapter), "base"),
    ]
    table = Table(title, ("what", "numbers"), rows)
    return Figure(
        title,
        Markup(bars(title, shown)),
        f"{account.percent:.2f} % of the adapter's numbers are trained.",
        table,
    )


def circuit_figures(logical: LogicalCircuit, native: NativeCircuit, files: FileStore) -> list[Figure]:
    """Return the circuit, and what a device makes of it where there is one.

    Raises:  DocumentError: the native circuit's file is missing or damaged.
    """
    from qpa.circuits.qiskit_files import load_qpy, to_qiskit

    figures = [
        _drawn("The circuit", draw_circuit(to_qiskit(logical.ansatz), "The circuit"), "t are its angles.")
    ]
    if native.target != NO_DEVICE:
        path = files.get(native.qpy)
        title = f"The same on {native.target}"
        drawing = draw_circuit(load_qpy(path.read_bytes(), str(path)), title)
        figures.append(_drawn(title, drawing, "Wires are the device's qubits, gates its own."))
    return figures


def _drawn(title: str, drawing: Drawing, words: str) -> Figure:
    cut = f" Drawn are the first {drawing.n_drawn} of {drawing.n_columns} columns."
    return Figure(
        title, Markup(drawing.svg), f"{title}. {words}{cut if drawing.n_drawn < drawing.n_columns else ''}"
    )


def probability_figure(measurement: Measurement, files: FileStore) -> Figure | None:
    """Return a histogram of the measured probabilities; None where a control gives the features.

    Raises:  DocumentError: the file is missing or damaged.
    """
    import numpy as np

    if measurement.probabilities is None:
        return None
    found = TensorFile.open(files.get(measurement.probabilities)).read("probabilities")
    n_circuits, n_states = found.shape
    exact = found.astype(np.float64).ravel()
    least = max(exact[exact > 0].min(), LEAST_PROBABILITY)
    low = math.floor(math.log10(least))
    high = max(math.ceil(math.log10(exact.max())), low + 1)
    logs = np.log10(np.maximum(exact, 10.0**low))
    ticks = tuple(float(power) for power in range(low, high + 1, max(1, (high - low) // 5)))
    x = Axis("probability", low, high, ticks, _power_of_ten)
    title = "Probabilities of the basis states"
    caption = (
        f"The {number(n_states)} basis states of {several(n_circuits, 'circuit')}, "
        f"from {found.min():.2g} to {found.max():.2g}. Were they alike, each would have {1 / n_states:.2g}."
    )
    if found.min() < 10.0**low:
        caption += " The first bar holds all smaller ones too."
    return _histogram(title, x, logs, caption, lambda value: f"{10**value:.2g}")


def weight_figures(frozen: FrozenAdapter, files: FileStore) -> list[Figure]:
    """Return a histogram of the adapter's numbers for each role, such as lora_A.

    Raises:  DocumentError: the file is missing or damaged.
    """
    import numpy as np

    file = TensorFile.open(files.get(frozen.arrays))
    paths: dict[str, list[str]] = defaultdict(list)
    for tensor in frozen.tensors:
        paths[tensor.role].append(tensor.path)
    figures = []
    for role, members in paths.items():
        sums = np.array([_moments(file.read(path)) for path in members])
        n, total, squares = sums[:, :3].sum(0)
        mean, low, high = total / n, sums[:, 3].min(), sums[:, 4].max()
        deviation = math.sqrt(max(squares / n - mean**2, 0.0))
        edge = min(max(abs(low), abs(high)), 4 * deviation) or 1.0
        axis = nice_axis(f"weight of {role}", [-edge, edge])
        counts = np.sum([_counts(file.read(path), axis) for path in members], axis=0)
        caption = (
            f"{role}: {number(int(n))} numbers in {several(len(members), 'tensor')}, "
            f"from {low:.3g} to {high:.3g}, mean {mean:.2g}, standard deviation {deviation:.3g}."
        )
        outside = max(abs(low), abs(high)) > axis.high
        caption += " The outermost bars hold all that is further out." if outside else ""
        figures.append(_figure(f"Weights of {role}", axis, counts, caption, "{:.3g}".format))
    return figures


def _moments(array: NDArray[Any]) -> tuple[float, ...]:
    import numpy as np

    values = array.astype(np.float64)
    return (
        values.size,
        float(values.sum()),
        float((values**2).sum()),
        float(values.min()),
        float(values.max()),
    )


def _counts(array: NDArray[Any], axis: Axis) -> NDArray[Any]:
    import numpy as np

    clipped = np.clip(array.astype(np.float64), axis.low, axis.high)
    return np.histogram(clipped, N_BINS, (axis.low, axis.high))[0]


def _histogram(title: str, axis: Axis, values: NDArray[Any], caption: str, write: Any) -> Figure:
    return _figure(title, axis, _counts(values, axis), caption, write)


def _figure(title: str, axis: Axis, counts: NDArray[Any], caption: str, write: Any) -> Figure:
    width = (axis.high - axis.low) / len(counts)
    rows: Rows = [
        (f"{write(axis.low + index * width)} to {write(axis.low + (index + 1) * width)}", number(int(count)))
        for index, count in enumerate(counts)
        if count
    ]
    svg = Markup(histogram(title, axis, [int(count) for count in counts]))
    return Figure(title, svg, caption, Table(title, ("from, to", "count"), rows))


def _power_of_ten(power: float) -> str:
    digits = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if power == 0 else f"10{digits}"
