"""Draw how one linear layer gets its adapter, from the documents of a real run.

    python -m demo.picture runs/demo model.layers.0.self_attn.o_proj docs/one-layer.svg

Reads a trained run; writes an SVG that shows the circuit in whose window the layer is, the probabilities that
were measured, and the layer's chunks in lora_A and lora_B.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from safetensors.numpy import load_file

from qpa.cli.flags import error_line
from qpa.documents import AdapterSpec, AdapterTensor, ChunkGroup, FrozenAdapter, Measurement, WeightLayout
from qpa.errors import DocumentError, QpaError
from qpa.store.run_directory import RunDirectory

WIDTH, HEIGHT = 1000, 430
INK, FAINT, ROW, BASIS = "#222222", "#b8bec6", "#c2410c", "#1d4ed8"


@dataclass(frozen=True)
class Layer:
    """What the picture tells of one linear layer.

    Args:    circuit: number of the circuit whose window the layer is in.
             probabilities: of that circuit, one a basis state.
             groups: those that fill the layer's lora_A and lora_B, each with its first chunk of the layer.
    """

    spec: AdapterSpec
    layout: WeightLayout
    a: AdapterTensor
    b: AdapterTensor
    circuit: int
    probabilities: tuple[float, ...]
    groups: tuple[tuple[ChunkGroup, int], ...]


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draw how one linear layer gets its adapter.")
    parser.add_argument("run", type=Path)
    parser.add_argument("module")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        picture = draw(read_layer(RunDirectory.open(arguments.run), arguments.module))
    except QpaError as error:
        sys.exit(f"error: {error_line(error, {'out': '--out'})}")
    arguments.out.write_text(picture)


def read_layer(run: RunDirectory, module: str) -> Layer:
    """Return what the documents of a trained run say of a layer.

    Raises:  DocumentError: the run is not trained, or has no lora_A and lora_B for such a layer.
    """
    run.read_through(FrozenAdapter)
    spec, layout = run.read(AdapterSpec), run.read(WeightLayout)
    pairs = {pair[0].module: pair for pair in spec.pairs}
    if module not in pairs:
        example = f"such as {next(iter(pairs))}" if pairs else "of which this run has none"
        raise DocumentError(str(run.path), f"a layer with lora_A and lora_B, {example}", f"no {module}")
    a, b = pairs[module]
    groups = tuple(
        (group, tensor.chunks[0])
        for group in layout.groups
        for tensor in group.tensors
        if tensor.path in (a.path, b.path) and tensor.chunks
    )
    measured = load_file(run.files.get(run.read(Measurement).probabilities))["probabilities"]
    first, chunk = groups[0]
    circuit = chunk * layout.n_circuits // first.n_chunks
    return Layer(spec, layout, a, b, circuit, tuple(map(float, measured[circuit])), groups)


def draw(layer: Layer) -> str:
    """Return the picture as SVG, the same bytes for the same run."""
    parts = [*_circuit(layer), *_probabilities(layer), *_decoders(layer), *_factors(layer)]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">\n'
        f"<title>{escape(layer.a.module)}: from a circuit to lora_A and lora_B</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _circuit(layer: Layer) -> Iterator[str]:
    ansatz = layer.layout.ansatz
    yield _text(20, 30, f"circuit {layer.circuit + 1} of {layer.layout.n_circuits}", bold=True)
    yield _text(20, 48, f"{ansatz.n_angles} trained angles")
    step = min(34, 230 // ansatz.n_qubits)
    for qubit in range(ansatz.n_qubits):
        y = 80 + qubit * step
        yield _line(20, y, 190, y)
        yield _box(34, y - 10, 34, 20, "#ffffff", INK) + _text(51, y + 4, "RY", middle=True)
        if qubit + 1 < ansatz.n_qubits:
            x = 84 + qubit * min(14, 90 // ansatz.n_qubits)
            yield f'<circle cx="{x}" cy="{y}" r="3"/>' + _line(x, y, x, y + step)
            yield f'<circle cx="{x}" cy="{y + step}" r="6" fill="none" stroke="{INK}"/>'
    yield _arrow(200, 170, 236)


def _probabilities(layer: Layer) -> Iterator[str]:
    n_states, top = len(layer.probabilities), max(layer.probabilities)
    yield _text(250, 30, f"{n_states} probabilities", bold=True)
    yield _text(250, 48, f"{layer.layout.ansatz.n_qubits} qubits; a chunk reads one of them")
    width = 230 / n_states
    places = {group.states[chunk]: _color(group) for group, chunk in layer.groups}
    for state, probability in enumerate(layer.probabilities):
        height = max(0.5, 170 * probability / top)
        color = places.get(state, FAINT)
        x = 250 + state * width
        size = f'width="{width:.2f}" height="{height:.2f}"'
        yield f'<rect x="{x:.2f}" y="{260 - height:.2f}" {size} fill="{color}"/>'
    yield _line(250, 260, 480, 260)
    for row, (group, chunk) in enumerate(layer.groups):
        state = group.states[chunk]
        bits = f"{state:0{layer.layout.ansatz.n_qubits}b}"
        text = f"|{bits}>  p = {layer.probabilities[state]:.4f}"
        yield _text(250, 288 + 20 * row, text, color=_color(group))
    yield _arrow(490, 170, 526)


def _decoders(layer: Layer) -> Iterator[str]:
    n_features = layer.layout.n_features
    yield _text(540, 30, "decoders", bold=True)
    yield _text(540, 48, f"{n_features} features, one a circuit, each")
    for row, (group, _) in enumerate(layer.groups):
        y = 90 + 66 * row
        color = _color(group)
        yield _box(540, y - 20, 190, 46, "#ffffff", color)
        yield _text(550, y, f"{n_features} x {group.chunk_size} weights", color=color)
        yield _text(550, y + 17, f"shared by {group.n_chunks} layers")
    yield _arrow(740, 170, 776)


def _factors(layer: Layer) -> Iterator[str]:
    rank, (n_out, n_in) = layer.spec.rank, (layer.b.shape[0], layer.a.shape[1])
    yield _text(790, 30, "lora_A and lora_B", bold=True)
    yield _text(790, 48, f"rank {rank}; of a {n_out} x {n_in} layer")
    n_rows = sum(1 for group, _ in layer.groups if group.axis == "row")
    cell = min(14, 100 // rank)
    for index in range(rank):
        color = ROW if index < n_rows else BASIS
        shade = "1" if index < n_rows else "0.25"
        look = f'fill="{color}" opacity="{shade}"'
        yield f'<rect x="790" y="{70 + index * cell}" width="180" height="{cell - 2}" {look}/>'
        yield f'<rect x="{790 + index * cell}" y="210" width="{cell - 2}" height="120" {look}/>'
    yield _text(790, 192, f"lora_A [{rank}, {n_in}]")
    yield _text(790, 350, f"lora_B [{n_out}, {rank}]")
    scale = layer.spec.alpha / rank
    yield _text(20, 385, f"{layer.a.module}:  W + {scale:g} lora_B lora_A", bold=True)
    yield _text(20, 407, "orange: one generated row and column", color=ROW)
    yield _text(290, 407, "blue: fixed directions of the gradient times generated factors", color=BASIS)


def _color(group: ChunkGroup) -> str:
    return BASIS if group.axis == "spectrum" else ROW


def _text(
    x: float, y: float, text: str, *, bold: bool = False, middle: bool = False, color: str = INK
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x}" y="{y}" fill="{color}"{weight}{anchor}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}"/>'


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}"/>'


def _arrow(x1: float, y: float, x2: float) -> str:
    return _line(x1, y, x2, y) + f'<path d="M {x2} {y} l -8 -4 v 8 z"/>'


if __name__ == "__main__":
    main()
