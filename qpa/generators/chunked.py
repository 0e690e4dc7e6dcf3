"""The generator that a WeightLayout describes: decoders of the features of chunks, laid into tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qpa.circuits.circuit import Circuit
from qpa.circuits.execution import Execution
from qpa.documents import ChunkedTensor, WeightLayout
from qpa.errors import ShapeError
from qpa.generators.chunks import basis_names, basis_shapes
from qpa.generators.decoders import LinearDecoder
from qpa.generators.fast_weights import add_program
from qpa.generators.features.kind import FEATURES, FeatureModule
from qpa.generators.features.states import state_bits
from qpa.generators.generator import Bases, ParameterGroup
from qpa.generators.parametrized import ParametrizedTensors
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
        add_program(self, self.chunk_features, layout, seed)
        self.decoders = nn.ModuleList(
            LinearDecoder(group.decoder, split_seed(seed, group.name)) for group in layout.groups
        )
        if layout.features.has_index_bits:
            n_qubits = layout.ansatz.n_qubits
            self.register_buffer("bits", state_bits(2**n_qubits, n_qubits), persistent=False)
        if layout.parametrized:
            self.parametrized = ParametrizedTensors(layout, seed)
        self._alike = _find_alike(layout)
        self.basis_names = basis_names(layout)
        self._basis_places: dict[str, tuple[str, int]] = {}
        self._register_places()
        self.register_state_dict_post_hook(_name_bases)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_bases)  # type: ignore[no-untyped-call]
        if bases is not None:
            self.set_bases(bases)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return the decoders' parameters, those of features and contexts that are trained, and others."""
        programming = self.get_submodule("contexts").parameters() if self.layout.features.contexts else ()
        of_features = tuple(p for p in (*self.chunk_features.parameters(), *programming) if p.requires_grad)
        return (
            ParameterGroup("decoder", tuple(self.decoders.parameters()), rate="lr", decays=True),
            ParameterGroup("features", of_features, rate="angle_lr", decays=False),
            *(self.parametrized.parameter_groups() if self.layout.parametrized else ()),
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
        decoded = [
            decoder(features[self.get_buffer(f"states_{index}")])
            for index, decoder in enumerate(self.decoders)
        ]
        found: dict[str, Tensor] = self.parametrized() if self.layout.parametrized else {}
        for number, alike in enumerate(self._alike):
            blocks = [self._blocks(number, place, decoded) for place in range(len(alike.blocks))]
            found.update(zip(alike.paths, _join(blocks, alike.shape).unbind(), strict=True))
        for group, chunks in zip(self.layout.groups, decoded, strict=True):
            if group.axis == "flat":
                found.update(_split_flat(group.tensors, chunks))
        return tuple(found[tensor.path] for tensor in self.layout.tensors)

    @torch.no_grad()
    def set_bases(self, bases: Bases) -> None:
        """Take the singular vectors of the layout's spectra.

        Raises:  ShapeError: one is missing or has another shape.
        """
        for path, shape in basis_shapes(self.layout).items():
            found = tuple(bases[path].shape) if path in bases else "none"
            if found != shape:
                raise ShapeError(path, f"a basis of shape {shape}", str(found))
            self.basis(path).copy_(bases[path])

    def _register_places(self) -> None:
        """Keep which features belong to which chunks, which chunks to which tensors, and room for bases."""
        for index, group in enumerate(self.layout.groups):
            self.register_buffer(f"states_{index}", torch.tensor(group.states), persistent=False)
        shapes = basis_shapes(self.layout)
        for number, alike in enumerate(self._alike):
            for place, block in enumerate(alike.blocks):
                chunks = torch.tensor(block.chunks, dtype=torch.long)
                self.register_buffer(f"chunks_{number}_{place}", chunks, persistent=False)
                if self.layout.groups[block.group].axis != "spectrum":
                    continue
                name = f"bases_{number}_{place}"
                self._basis_places |= {path: (name, index) for index, path in enumerate(alike.paths)}
                room = torch.zeros(len(alike.paths), *shapes[alike.paths[0]])
                self.register_buffer(name, room, persistent=False)

    def basis(self, path: str) -> Tensor:
        """Return a tensor's singular vectors, to be read or written; `basis_names` has the paths."""
        name, index = self._basis_places[path]
        return self.get_buffer(name)[index]

    def _blocks(self, number: int, place: int, decoded: Sequence[Tensor]) -> Tensor:
        """Return a block of all tensors that are alike, float[n_tensors, n_rows, n_columns]."""
        block = self._alike[number].blocks[place]
        axis, chunks = self.layout.groups[block.group].axis, self.get_buffer(f"chunks_{number}_{place}")
        if not chunks.numel():
            return self.get_buffer(f"bases_{number}_{place}")
        used = decoded[block.group][chunks]
        if axis == "row":
            return used
        if axis == "column":
            return used.mT
        return self.get_buffer(f"bases_{number}_{place}") * used.flatten(1)[:, None]


class _Block(NamedTuple):
    """Rows or columns that one group gives to each of several tensors.

    Args:    group: its index in the layout.
             chunks: for each tensor, which of the group's chunks it gets; all get equally many.
    """

    group: int
    chunks: tuple[tuple[int, ...], ...]


class _Alike(NamedTuple):
    """Tensors of one shape that the same groups fill in the same way: they are decoded together.

    One operation on all of them takes the place of one on each, which a GPU would start one by one.

    Args:    blocks: laid side by side.
    """

    paths: tuple[str, ...]
    shape: tuple[int, int]
    blocks: tuple[_Block, ...]


def _find_alike(layout: WeightLayout) -> tuple[_Alike, ...]:
    """Return the tensors that are filled by rows, columns or spectra, those that are alike together."""
    blocks: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for index, group in enumerate(layout.groups):
        if group.axis != "flat":
            for tensor in group.tensors:
                blocks.setdefault(tensor.path, []).append((index, tensor.chunks))
    alike: dict[Any, list[str]] = {}
    for path, shape in ((one.path, one.shape) for one in layout.tensors if one.path in blocks):
        filled = tuple((index, len(chunks)) for index, chunks in blocks[path])
        alike.setdefault((shape, filled), []).append(path)
    return tuple(
        _Alike(
            tuple(paths),
            shape,
            tuple(
                _Block(index, tuple(blocks[path][place][1] for path in paths))
                for place, (index, _) in enumerate(filled)
            ),
        )
        for (shape, filled), paths in alike.items()
    )


def _name_bases(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Put the bases into a state, each by a name of its own and not in the arrays that hold several."""
    assert isinstance(module, ChunkedGenerator)
    for path, name in module.basis_names.items():
        state[prefix + name] = module.basis(path).clone()


def _take_bases(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Take the bases out of a state that is loaded."""
    assert isinstance(module, ChunkedGenerator)
    *_, strict, missing, _unexpected, errors = rest
    for path, name in module.basis_names.items():
        found, basis = state.pop(prefix + name, None), module.basis(path)
        if found is None:
            missing += [prefix + name] if strict else []
        elif found.shape != basis.shape:
            errors.append(f"{name}: expected shape {tuple(basis.shape)}, found {tuple(found.shape)}")
        else:
            basis.detach().copy_(found)


def _split_flat(tensors: tuple[ChunkedTensor, ...], chunks: Tensor) -> Iterator[tuple[str, Tensor]]:
    sizes = [tensor.n_numbers for tensor in tensors]
    for tensor, piece in zip(tensors, torch.split(chunks.flatten()[: sum(sizes)], sizes), strict=True):
        yield tensor.path, piece.view(tensor.shape)


def _join(blocks: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Lay blocks of whole rows, or of whole columns, side by side, and fill up with zeros.

    Args:    blocks: float[n_tensors, n_rows, n_columns].
    Returns: float[n_tensors, *shape].
    """
    axis = 1 if all(block.shape[2] == shape[1] for block in blocks) else 2
    joined = torch.cat(list(blocks), dim=axis) if len(blocks) > 1 else blocks[0]
    n_rows, n_columns = shape[0] - joined.shape[1], shape[1] - joined.shape[2]
    return nn.functional.pad(joined, (0, n_columns, 0, n_rows)) if n_rows or n_columns else joined
