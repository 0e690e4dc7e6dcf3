"""The generator that a WeightLayout describes: decoders of the features of chunks, laid into tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qpa.circuits.circuit import Circuit
from qpa.circuits.execution import Execution
from qpa.documents import ChunkedTensor, ChunkGroup, WeightLayout
from qpa.errors import ShapeError
from qpa.generators.chunks import basis_shapes
from qpa.generators.decoders import LinearDecoder
from qpa.generators.features.kind import FEATURES, FeatureModule
from qpa.generators.features.states import state_bits
from qpa.generators.generator import Bases, ParameterGroup
from qpa.seeds import split_seed


class ChunkedGenerator(nn.Module):
    """Generate what is added to the initial adapter; a `qpa.generators.generator.Generator`.

    Args:    layout: the layout, which gives the shapes of everything.
             seed: the seed of the angles and the decoders' hidden layers.
             bases: singular vectors of the gradient (`qpa.training.calibration`) for the spectra of the
             layout; without them the spectra generate nothing until a state with bases is loaded.
             execution: how the circuits are run; None simulates them exactly.
    Raises:  ShapeError: the bases are not the layout's.
    Source:  ours; after Quantum Parameter Adaptation, arXiv 2410.09846.
    """

    def __init__(
        self,
        layout: WeightLayout,
        seed: int,
        bases: Bases | None = None,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.chunk_features: FeatureModule = FEATURES[layout.features.kind].build(
            layout, seed, execution or Execution(Circuit(layout.ansatz))
        )
        self.decoders = nn.ModuleList(
            LinearDecoder(group.decoder, split_seed(seed, group.name)) for group in layout.groups
        )
        if layout.features.has_index_bits:
            n_qubits = layout.ansatz.n_qubits
            self.register_buffer("bits", state_bits(2**n_qubits, n_qubits), persistent=False)
        self._register_places()
        self._shapes = {tensor.path: tensor.shape for tensor in layout.tensors}
        self._basis_names: dict[str, str] = {}
        for index, (path, shape) in enumerate(basis_shapes(layout).items()):
            self._basis_names[path] = f"basis_{index}"
            self.register_buffer(self._basis_names[path], torch.zeros(shape))
        if bases is not None:
            self.set_bases(bases)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return the decoders' parameters, and those of the features that are trained."""
        of_features = tuple(p for p in self.chunk_features.parameters() if p.requires_grad)
        return (
            ParameterGroup("decoder", tuple(self.decoders.parameters()), rate="lr", decays=True),
            ParameterGroup("features", of_features, rate="angle_lr", decays=False),
        )

    def run(self) -> Tensor | None:
        """Run the circuits; return float[n_circuits, 2**n_qubits], None where a control has none."""
        return self.chunk_features.run()

    def connect(self, measured: Tensor | None) -> Tensor | None:
        """Return what an earlier `run` measured, connected to the angles again."""
        connected: Tensor | None = self.chunk_features.connect(measured)
        return connected

    def features(self, probabilities: Tensor | None) -> Tensor:
        """Return float[2**n_qubits, n_features] by basis state: index bits if any, then one per circuit."""
        features: Tensor = self.chunk_features(probabilities)
        if not self.layout.features.has_index_bits:
            return features
        return torch.cat((self.get_buffer("bits"), features), dim=1)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the generated part of every adapter tensor, in the order and shapes of `layout.tensors`."""
        return self.decode(self.features(self.run()))

    def decode(self, features: Tensor) -> tuple[Tensor, ...]:
        """Decode `features` to the adapter's tensors, as `forward` returns them."""
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

    def _register_places(self) -> None:
        """Keep which features belong to which chunks, and which chunks to which tensors, as index tensors."""
        for index, group in enumerate(self.layout.groups):
            self.register_buffer(f"states_{index}", torch.tensor(group.states), persistent=False)
            for place, tensor in enumerate(group.tensors):
                chunks = torch.tensor(tensor.chunks, dtype=torch.long)
                self.register_buffer(f"chunks_{index}_{place}", chunks, persistent=False)

    def _basis(self, path: str) -> Tensor:
        return self.get_buffer(self._basis_names[path])

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
