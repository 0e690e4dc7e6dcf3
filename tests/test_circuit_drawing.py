"""Circuits drawn as SVG: every gate is there, in its place, and none lies over another."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector

from qpa.circuits.qiskit_files import to_qiskit
from qpa.report.page.circuit_drawing import MAX_COLUMNS, draw_circuit
from tests.chains import chain


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def shapes(svg: str, tag: str, style: str) -> list[dict[str, str]]:
    return [e.attrib for e in ElementTree.fromstring(svg).iter(tag) if e.get("class") == style]


def test_every_gate_of_the_chain_is_drawn() -> None:
    drawing = draw_circuit(to_qiskit(chain(n_qubits=3, n_layers=2)), "the chain")
    assert texts(drawing.svg) == ["q0", "q1", "q2", *(f"ry(t{n})" for n in (0, 1, 2, 3, 4, 5))]
    assert len(shapes(drawing.svg, "circle", "target")) == len(shapes(drawing.svg, "circle", "control")) == 4
    assert len(shapes(drawing.svg, "rect", "measure")) == 3
    assert drawing.n_drawn == drawing.n_columns == 7


def test_gates_of_devices_have_their_names_and_angles_are_parts_of_pi() -> None:
    angles = ParameterVector("t", 1)
    circuit = QuantumCircuit(133, 1)
    circuit.rz(3.141592653589793 / 2, 20)
    circuit.rz(angles[0] + 3.141592653589793, 20)
    circuit.rx(0.123456, 3)
    circuit.ecr(3, 20)
    circuit.cz(3, 100)
    circuit.swap(3, 20)
    circuit.crz(0.5, 20, 3)
    circuit.barrier()
    circuit.measure(20, 0)
    drawing = draw_circuit(circuit, "native <&>")
    assert {"q3", "q20", "q100", "rz(π/2)", "rz(π + t0)", "rx(0.123)", "ecr", "rz(0.5)"} == {
        *texts(drawing.svg)
    }
    assert "<&>" not in drawing.svg
    assert (
        len(shapes(drawing.svg, "circle", "control")) == 3 and len(shapes(drawing.svg, "path", "cross")) == 2
    )


def test_what_a_gate_spans_is_its_own() -> None:
    circuit = QuantumCircuit(3)
    circuit.cx(0, 2)
    circuit.x(1)
    circuit.h(0)
    drawing = draw_circuit(circuit, "spans")
    (link,) = shapes(drawing.svg, "line", "link")
    boxes = shapes(drawing.svg, "rect", "gate")
    assert len(boxes) == 2 and all(float(box["x"]) > float(link["x1"]) for box in boxes)
    assert drawing.n_columns == 2


@pytest.mark.parametrize("n_gates", [MAX_COLUMNS, MAX_COLUMNS + 5])
def test_of_a_long_circuit_the_beginning_is_drawn(n_gates: int) -> None:
    circuit = QuantumCircuit(1)
    for _ in range(n_gates):
        circuit.sx(0)
    drawing = draw_circuit(circuit, "long")
    assert (drawing.n_columns, drawing.n_drawn) == (n_gates, MAX_COLUMNS)
    assert len(shapes(drawing.svg, "rect", "gate")) == MAX_COLUMNS
    assert len(shapes(drawing.svg, "line", "wire cut")) == (n_gates > MAX_COLUMNS)
