"""The generator: decoder(features(probabilities(angles))), in the shapes a WeightLayout prescribes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qpa.documents import ChunkedTensor, ChunkGroup, WeightLayout
from qpa.pipeline import split_seed
from qpa.probability_source import ProbabilitySource, differentiable_probabilities
from qpa.simulator import ExactSimulator

FEATURE_EPSILON = 0.01
FEATURE_MEAN = math.sqrt(2 / math.pi)
"""Mean of sqrt(p * 2**n_qubits) over random real states, whose amplitudes are normal: that of |N(0, 1)|."""


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
             seed: for the angles (uniform in [-pi, pi)) and the decoders' hidden layers.
             source: evaluates the circuits.
    Source:  ours; after Quantum Parameter Adaptation, arXiv 2410.09846.
    """

    def __init__(self, layout: WeightLayout, seed: int, source: ProbabilitySource | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.source: ProbabilitySource = source or ExactSimulator()
        shape = (layout.n_circuits, layout.n_layers, layout.n_qubits)
        random = torch.Generator().manual_seed(split_seed(seed, "angles"))
        self.angles = nn.Parameter(torch.empty(shape).uniform_(-math.pi, math.pi, generator=random))
        self.decoders = nn.ModuleList(Decoder(group, split_seed(seed, group.name)) for group in layout.groups)
        bits = _index_bits(layout) if layout.index_bits else torch.empty(layout.n_chunks, 0)
        self.register_buffer("index_bits", bits, persistent=False)

    def features(self) -> Tensor:
        """Return float[n_chunks, n_features]: index bits if the layout has them, then one per circuit.

        A circuit's feature of chunk c is sqrt(p[c] * 2**n_qubits + eps), less a constant: its gradient
        variance does not vanish with the number of qubits, and it is finite at p = 0. Without the constant
        all features are positive, every step of a decoder adds up over the circuits, and the largest stable
        learning rate falls with their number.
        """
        probabilities = differentiable_probabilities(self.source, self.angles)
        used = probabilities[:, : self.layout.n_chunks]
        amplitudes = torch.sqrt(used * 2.0**self.layout.n_qubits + FEATURE_EPSILON)
        assert isinstance(self.index_bits, Tensor)
        return torch.cat((self.index_bits, amplitudes.T - FEATURE_MEAN), dim=1)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the generated part of every adapter tensor, in the order and shapes of `layout.tensors`."""
        return self.decode(self.features())

    def decode(self, features: Tensor) -> tuple[Tensor, ...]:
        """Decode float[n_chunks, n_features] to the adapter's tensors, as `forward` returns them."""
        tensors: list[Tensor] = []
        for group, decoder in zip(self.layout.groups, self.decoders, strict=True):
            rows = features[group.first_chunk : group.first_chunk + group.n_chunks]
            tensors.extend(assemble(group, decoder(rows)))
        return tuple(tensors)

    @property
    def n_parameters(self) -> int:
        """Return the number of trainable numbers, counted from the module itself."""
        return sum(parameter.numel() for parameter in self.parameters())


def assemble(group: ChunkGroup, chunks: Tensor) -> tuple[Tensor, ...]:
    """Turn a group's chunks into its tensors.

    Args:    chunks: float[n_chunks, chunk_size].
    Returns: one tensor for each of `group.tensors`, of that shape.
    Source:  see ChunkGroup for the numbering.
    """
    if group.axis == "flat":
        sizes = [tensor.n_numbers for tensor in group.tensors]
        pieces = torch.split(chunks.flatten()[: sum(sizes)], sizes)
        return tuple(piece.view(tensor.shape) for piece, tensor in zip(pieces, group.tensors, strict=True))
    pieces = torch.split(chunks, [group.chunks_of(tensor) for tensor in group.tensors])
    return pieces if group.axis == "row" else tuple(piece.T for piece in pieces)


def initial_value(tensor: ChunkedTensor, rule: str, seed: int) -> Tensor:
    """Return an adapter tensor's value before training, float32, on the CPU.

    Args:    rule: "zeros", or "kaiming_uniform": uniform in +-1/sqrt(in_features), as PEFT draws lora_A.
             seed: of the run; the tensor's path is mixed in, so tensors do not depend on their order.
    """
    if rule == "zeros":
        return torch.zeros(tensor.shape)
    random = torch.Generator().manual_seed(split_seed(seed, tensor.path))
    bound = 1 / math.sqrt(tensor.shape[1])
    return torch.empty(tensor.shape).uniform_(-bound, bound, generator=random)


def _index_bits(layout: WeightLayout) -> Tensor:
    index = torch.arange(layout.n_chunks)[:, None]
    shifts = torch.arange(layout.n_qubits - 1, -1, -1)
    return ((index >> shifts) & 1).to(torch.float32)
