"""A circuit as SVG in the colours of the page, one column of gates after another.

A gate on several qubits takes the wires between them too, so nothing is drawn over it. Wires are the qubits
that a gate acts on. Angles are named as in the circuit; a device's fixed angles are in radians.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from qpa.circuits.operations import qubits_of

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

MAX_COLUMNS = 120
"""Columns that are drawn; of a longer circuit, its beginning."""

WIRE, GATE_HEIGHT, CHARACTER, GAP, MARGIN = 38, 26, 7, 14, 12
"""Pixels between wires, of a gate, of a letter, between columns, and around the drawing."""

_CONTROLLED = {"cx": "x", "cz": "z", "cy": "y", "ch": "h", "crx": "rx", "cry": "ry", "crz": "rz"}


@dataclass(frozen=True)
class Drawing:
    """A drawn circuit.

    Args:    n_columns: of the whole circuit; n_drawn: of the drawing.
    """

    svg: str
    n_columns: int
    n_drawn: int


@dataclass(frozen=True)
class _Gate:
    name: str
    text: str
    wires: tuple[int, ...]


def draw_circuit(circuit: QuantumCircuit, title: str, wire_names: Sequence[str] | None = None) -> Drawing:
    """Draw a circuit.

    Args:    title: what it is, for those who do not see it.
             wire_names: by the circuit's qubits; None numbers those that it uses.
    """
    gates = [_gate(circuit, instruction) for instruction in circuit.data]
    used = sorted({wire for gate in gates if gate.name != "barrier" for wire in gate.wires})
    place = {wire: index for index, wire in enumerate(used)}
    names = [wire_names[wire] if wire_names else f"q{wire}" for wire in used]
    moved = [replace(gate, wires=tuple(place[w] for w in gate.wires if w in place)) for gate in gates]
    moved = [gate for gate in moved if gate.wires]
    columns = _columns(moved, len(used))
    drawn = columns[:MAX_COLUMNS]
    return Drawing(_svg(drawn, names, title, is_cut=len(columns) > len(drawn)), len(columns), len(drawn))


def _gate(circuit: QuantumCircuit, instruction: Any) -> _Gate:
    operation = instruction.operation
    wires = qubits_of(instruction, circuit)
    angles = ", ".join(_angle(value) for value in operation.params)
    return _Gate(operation.name, f"{operation.name}({angles})" if angles else operation.name, wires)


def _angle(value: Any) -> str:
    """Return an angle with the letter pi in the place of its decimals, and t0 for t[0]."""
    from qiskit.circuit.tools import pi_check

    text: str = pi_check(value, output="text", ndigits=3)
    return text.replace("[", "").replace("]", "").replace("*", "\N{DOT OPERATOR}")


def _columns(gates: Sequence[_Gate], n_wires: int) -> list[list[_Gate]]:
    """Return the gates by column: each in the first one in which the wires that it spans are free."""
    free, columns = [0] * n_wires, list[list[_Gate]]()
    for gate in gates:
        span = range(min(gate.wires), max(gate.wires) + 1)
        column = max(free[wire] for wire in span)
        for wire in span:
            free[wire] = column + (gate.name != "barrier")
        if gate.name == "barrier":
            continue
        if column == len(columns):
            columns.append([])
        columns[column].append(gate)
    return columns


def _svg(columns: Sequence[Sequence[_Gate]], names: Sequence[str], title: str, *, is_cut: bool) -> str:
    left = MARGIN + CHARACTER * max(map(len, names), default=0) + GAP
    parts: list[str] = []
    x = float(left)
    for column in columns:
        width = max(_width(gate) for gate in column)
        for gate in column:
            parts += _drawn(gate, x + width / 2)
        x += width + GAP
    end = x + MARGIN
    wires = [_wire(index, name, left - GAP / 2, end, is_cut=is_cut) for index, name in enumerate(names)]
    width, height = round(end + MARGIN), WIRE * len(names) + MARGIN
    return (
        f'<svg class="circuit" role="img" aria-label="{escape(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join([*wires, *parts])}</svg>'
    )


def _width(gate: _Gate) -> float:
    if (gate.name in _CONTROLLED and gate.text == gate.name) or gate.name == "measure":
        return GATE_HEIGHT
    return max(GATE_HEIGHT, CHARACTER * len(gate.text) + 12)


def _y(wire: float) -> float:
    return WIRE * (wire + 0.5) + MARGIN / 2


def _wire(index: int, name: str, left: float, right: float, *, is_cut: bool) -> str:
    y = _y(index)
    dash = f'<line class="wire cut" x1="{right}" x2="{right + MARGIN}" y1="{y}" y2="{y}"/>' if is_cut else ""
    return (
        f'<text class="end" x="{left - 4}" y="{y + 4}">{escape(name)}</text>'
        f'<line class="wire" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>{dash}'
    )


def _drawn(gate: _Gate, x: float) -> Iterator[str]:
    first, last = min(gate.wires), max(gate.wires)
    if gate.name == "measure":
        y = _y(first)
        yield _box(x, y, GATE_HEIGHT, GATE_HEIGHT, "measure")
        yield f'<path class="meter" d="M{x - 8} {y + 6}a8 8 0 0 1 16 0M{x} {y + 6}l6 -11"/>'
    elif gate.name in _CONTROLLED or gate.name == "swap":
        yield f'<line class="link" x1="{x}" x2="{x}" y1="{_y(first)}" y2="{_y(last)}"/>'
        yield from _controlled(gate, x)
    else:
        height = _y(last) - _y(first) + GATE_HEIGHT
        yield _box(x, (_y(first) + _y(last)) / 2, _width(gate), height, "gate" if first == last else "pair")
        yield f'<text class="mid" x="{x}" y="{(_y(first) + _y(last)) / 2 + 4}">{escape(gate.text)}</text>'


def _controlled(gate: _Gate, x: float) -> Iterator[str]:
    control, target = (_y(wire) for wire in gate.wires)
    if gate.name == "swap":
        for y in (control, target):
            yield f'<path class="cross" d="M{x - 6} {y - 6}l12 12m0 -12l-12 12"/>'
        return
    yield f'<circle class="control" cx="{x}" cy="{control}" r="4"/>'
    if gate.name == "cz":
        yield f'<circle class="control" cx="{x}" cy="{target}" r="4"/>'
    elif gate.name == "cx":
        yield f'<circle class="target" cx="{x}" cy="{target}" r="10"/>'
        yield f'<path class="cross" d="M{x - 10} {target}h20M{x} {target - 10}v20"/>'
    else:
        text = gate.text.removeprefix("c")
        yield _box(x, target, _width(gate), GATE_HEIGHT, "gate")
        yield f'<text class="mid" x="{x}" y="{target + 4}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    return (
        f'<rect class="{style}" x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" '
        f'height="{height:g}" rx="3"/>'
    )
