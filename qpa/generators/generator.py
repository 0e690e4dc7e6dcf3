"""The generator: decoder(features(probabilities(angles))), in the shapes a WeightLayout prescribes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qpa.circuits.sources.exact import ExactSimulator
from qpa.circuits.sources.source import ProbabilitySource, differentiable_probabilities
from qpa.documents import ChunkedTensor, ChunkGroup, TensorShape, WeightLayout
from qpa.errors import ShapeError
from qpa.seeds import split_seed

FEATURE_EPSILON = 0.01
FEATURE_MEAN = math.sqrt(2 / math.pi)
"""Mean of sqrt(p * 2**n_qubits) over random real states, whose amplitudes are normal: that of |N(0, 1)|."""

WINDOW_NOISE = 0.01
"""Standard deviation, in radians, of what is added to angles that put a circuit on its window."""

Bases = Mapping[str, Tensor]
"""Singular vectors by path: for lora_A the right ones, float[n, in], for lora_B the left, float[out, n]."""


class Decoder(nn.Module):
    """Map the features of a group's chunks to the chunks: linear layers without activation.

    The last layer starts at zero, so the generator's output is exactly zero before the first step.
    Hidden layers start as torch's nn.Linear does, from a seed of their own.

    Source:  arXiv 2410.09846, mapping model of the public code (which has no activation); the zero
             start is ours.
    """

    def __init__(self, group: ChunkGroup, seed: int) -> None:
        super().__init__()
        widths = list(zip(group.decoder_widths, group.decoder_widths[1:], strict=False))
        self.weights = nn.ParameterList(torch.zeros(n_out, n_in) for n_in, n_out in widths)
        self.biases = nn.ParameterList(torch.zeros(n_out) for _, n_out in widths if group.decoder_bias)
        random = torch.Generator().manual_seed(seed)
        for index, (n_in, _) in enumerate(widths[:-1]):
            for parameter in (self.weights[index], *self.biases[index : index + 1]):
                nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=random)

    def forward(self, features: Tensor) -> Tensor:
        """Decode float[n_chunks, n_features] to float[n_chunks, chunk_size]."""
        for index, weight in enumerate(self.weights):
            bias = self.biases[index] if len(self.biases) else None
            features = nn.functional.linear(features, weight, bias)
        return features


class Generator(nn.Module):
    """Generate what is added to the initial adapter.

    Args:    layout: shapes of everything.
             seed: for the angles and the decoders' hidden layers.
             bases: singular vectors of the gradient (`qpa.training.calibration`) for the spectra of the
             layout; without them the spectra generate nothing until a state with bases is loaded.
             source: evaluates the circuits.
    Raises:  ShapeError: the bases are not the layout's.
    Source:  ours; after Quantum Parameter Adaptation, arXiv 2410.09846.
    """

    def __init__(
        self,
        layout: WeightLayout,
        seed: int,
        bases: Bases | None = None,
        source: ProbabilitySource | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.source: ProbabilitySource = source or ExactSimulator()
        self.angles = nn.Parameter(_initial_angles(layout, seed), requires_grad=layout.features != "random")
        self.decoders = nn.ModuleList(Decoder(group, split_seed(seed, group.name)) for group in layout.groups)
        if layout.index_bits or layout.features == "bits":
            self.register_buffer("bits", _bits(2**layout.n_qubits, layout.n_qubits), persistent=False)
        self._register_places()
        self._shapes = {tensor.path: tensor.shape for tensor in layout.tensors}
        self._basis_names: dict[str, str] = {}
        for index, (path, shape) in enumerate(basis_shapes(layout).items()):
            self._basis_names[path] = f"basis_{index}"
            self.register_buffer(self._basis_names[path], torch.zeros(shape))
        if bases is not None:
            self.set_bases(bases)

    def features(self) -> Tensor:
        """Return float[2**n_qubits, n_features] by basis state: index bits if any, then one per circuit."""
        features = self._circuit_features()
        if not self.layout.index_bits:
            return features
        return torch.cat((self.get_buffer("bits"), features), dim=1)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the generated part of every adapter tensor, in the order and shapes of `layout.tensors`."""
        return self.decode(self.features())

    def decode(self, features: Tensor) -> tuple[Tensor, ...]:
        """Decode `features()` to the adapter's tensors, as `forward` returns them."""
        blocks: dict[str, list[Tensor]] = {path: [] for path in self._shapes}
        for index, (group, decoder) in enumerate(zip(self.layout.groups, self.decoders, strict=True)):
            chunks = decoder(features[self.get_buffer(f"states_{index}")])
            for path, block in self._blocks(index, group, chunks):
                blocks[path].append(block)
        return tuple(_join(blocks[path], shape) for path, shape in self._shapes.items())

    @torch.no_grad()
    def set_bases(self, bases: Bases) -> None:
        """Take the singular vectors of the layout's spectra.

        Raises:  ShapeError: one is missing or has another shape.
        """
        for path, shape in basis_shapes(self.layout).items():
            found = tuple(bases[path].shape) if path in bases else "none"
            if found != shape:
                raise ShapeError(path, f"a basis of shape {shape}", str(found))
            self._basis(path).copy_(bases[path])

    @property
    def n_parameters(self) -> int:
        """Return the number of trainable numbers, counted from the module itself."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def _register_places(self) -> None:
        """Keep which features belong to which chunks, and which chunks to which tensors, as index tensors."""
        for index, group in enumerate(self.layout.groups):
            self.register_buffer(f"states_{index}", torch.tensor(group.states), persistent=False)
            for place, tensor in enumerate(group.tensors):
                chunks = torch.tensor(tensor.chunks, dtype=torch.long)
                self.register_buffer(f"chunks_{index}_{place}", chunks, persistent=False)

    def _basis(self, path: str) -> Tensor:
        return self.get_buffer(self._basis_names[path])

    def _circuit_features(self) -> Tensor:
        """Return float[2**n_qubits, n_circuits].

        Of uniform angles: sqrt(p * 2**n + eps), less a constant: its gradient variance does not vanish with
        the number of qubits, and it is finite at p = 0. Without the constant all features are positive,
        every step of a decoder adds up over the circuits, and the largest stable learning rate falls
        with their number. Of windows: the same in units of a window's own amplitude, so that it is 1
        inside and 0 outside, and learning rates do not depend on the number of circuits.
        """
        layout = self.layout
        if layout.features == "bits":
            return torch.tanh(self._signed_bits() @ self.angles.T)
        if layout.features == "classical":
            return self._table()
        probabilities = differentiable_probabilities(self.source, self.angles)
        if layout.windows is None:
            return torch.sqrt(probabilities * 2.0**layout.n_qubits + FEATURE_EPSILON).T - FEATURE_MEAN
        n_inside = 2.0 ** (layout.n_qubits - layout.windows.n_head_qubits)
        return torch.sqrt(probabilities * n_inside + FEATURE_EPSILON).T - math.sqrt(FEATURE_EPSILON)

    def _signed_bits(self) -> Tensor:
        """Return float[2**n_qubits, n_qubits + 1]: the bits as -1 and 1, and a one."""
        bits = self.get_buffer("bits")
        return torch.cat((2 * bits - 1, torch.ones_like(bits[:, :1])), dim=1)

    def _table(self) -> Tensor:
        """Return the classical control's table, the same for every group, by basis state."""
        repeated = self.angles.repeat_interleave(2**self.layout.n_qubits // self.angles.shape[1], dim=1)
        return repeated.T

    def _blocks(self, index: int, group: ChunkGroup, chunks: Tensor) -> Iterator[tuple[str, Tensor]]:
        if group.axis == "flat":
            yield from _split_flat(group.tensors, chunks)
            return
        for place, tensor in enumerate(group.tensors):
            used = chunks[self.get_buffer(f"chunks_{index}_{place}")]
            if group.axis == "row":
                yield tensor.path, used
            elif group.axis == "column":
                yield tensor.path, used.T
            else:
                basis = self._basis(tensor.path)
                yield tensor.path, basis * used.flatten() if tensor.chunks else basis


def basis_shapes(layout: WeightLayout) -> dict[str, tuple[int, int]]:
    """Return the shapes of the bases of the layout's spectra, by the path of the tensor that holds them."""
    shapes: dict[str, tuple[int, int]] = {}
    for group in (group for group in layout.groups if group.axis == "spectrum"):
        for a, b in zip(group.tensors[::2], group.tensors[1::2], strict=True):
            n = group.chunk_size * len(b.chunks)
            shapes |= {a.path: (n, a.shape[1]), b.path: (b.shape[0], n)}
    return shapes


def initial_value(tensor: TensorShape, rule: str, seed: int) -> Tensor:
    """Return an adapter tensor's value before training, float32, on the CPU.

    Args:    rule: "zeros"; "ones"; "kaiming_uniform": uniform in +-1/sqrt(in_features), as PEFT draws
             lora_A; "uniform" in +-1, which gives an embedding, whose inputs have a single one, the same.
             seed: of the run; the tensor's path is mixed in, so tensors do not depend on their order.
    """
    if rule in ("zeros", "ones"):
        return torch.full(tensor.shape, float(rule == "ones"))
    random = torch.Generator().manual_seed(split_seed(seed, tensor.path))
    bound = 1 / math.sqrt(tensor.shape[1]) if rule == "kaiming_uniform" else 1.0
    return torch.empty(tensor.shape).uniform_(-bound, bound, generator=random)


def _initial_angles(layout: WeightLayout, seed: int) -> Tensor:
    """Return the features' own parameters: float[n_circuits, n_layers, n_qubits] radians for circuits.

    A window is a product state, made by the last layer alone: RY(0) or RY(pi) on the qubits that number
    windows, RY(pi/2) on the others. The chain of CNOTs after it maps bits to prefix sums modulo 2, so
    each of the former is turned by the difference of two neighbouring bits.
    """
    random = torch.Generator().manual_seed(split_seed(seed, "angles"))
    n_circuits, windows = layout.n_circuits, layout.windows
    if layout.features == "bits":
        return torch.randn(n_circuits, layout.n_qubits + 1, generator=random)
    if layout.features == "classical":
        return _initial_table(layout, random)
    shape = (n_circuits, layout.n_layers, layout.n_qubits)
    if windows is None:
        return torch.empty(shape).uniform_(-math.pi, math.pi, generator=random)
    angles = WINDOW_NOISE * torch.randn(shape, generator=random)
    bits = _bits(n_circuits, windows.n_head_qubits)
    flips = bits.clone()
    flips[:, 1:] = (bits[:, 1:] - bits[:, :-1]).abs()
    angles[:, -1, : windows.n_head_qubits] += math.pi * flips
    angles[:, -1, windows.n_head_qubits :] += math.pi / 2
    return angles


def _initial_table(layout: WeightLayout, random: torch.Generator) -> Tensor:
    """Return float[n_circuits, n_entries], normal, or the windows themselves where the layout has them."""
    if layout.windows is None:
        return torch.randn(layout.n_circuits, 2**layout.n_qubits, generator=random)
    n_inside = 2**layout.windows.n_layer_qubits
    inside = torch.eye(layout.n_circuits, 2**layout.windows.n_head_qubits).repeat_interleave(n_inside, dim=1)
    return inside + WINDOW_NOISE * torch.randn(inside.shape, generator=random)


def _bits(n_states: int, n_bits: int) -> Tensor:
    shifts = torch.arange(n_bits - 1, -1, -1)
    return ((torch.arange(n_states)[:, None] >> shifts) & 1).to(torch.float32)


def _split_flat(tensors: tuple[ChunkedTensor, ...], chunks: Tensor) -> Iterator[tuple[str, Tensor]]:
    sizes = [tensor.n_numbers for tensor in tensors]
    for tensor, piece in zip(tensors, torch.split(chunks.flatten()[: sum(sizes)], sizes), strict=True):
        yield tensor.path, piece.view(tensor.shape)


def _join(blocks: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Lay blocks of whole rows, or of whole columns, side by side, and fill up with zeros."""
    axis = 0 if all(block.shape[1] == shape[1] for block in blocks) else 1
    joined = torch.cat(blocks, dim=axis) if len(blocks) > 1 else blocks[0]
    n_rows, n_columns = shape[0] - joined.shape[0], shape[1] - joined.shape[1]
    return nn.functional.pad(joined, (0, n_columns, 0, n_rows)) if n_rows or n_columns else joined
