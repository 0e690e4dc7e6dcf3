"""Cayley: every block of a layer's inputs is rotated, so that its weight W becomes W R^T.

R is orthogonal and block-diagonal, and each block is (I - Q) (I + Q)^-1 for a skew-symmetric Q. oft_R holds
the numbers above the diagonal of every Q, blocks in turn, as one row; they start at zero, where R is the
identity. The size of the blocks is in the place of a rank, and divides the inputs of every adapted layer.
Shared, a layer has one block, which all its blocks are: the smallest sizes.

arXiv 2605.05914 puts such blocks into the frozen projections of Llama 3.1 8B, runs them as circuits on a
quantum device, and reports a perplexity 1.4 % lower with about 6,000 numbers. This is the control to it: the
same family of matrices without a device. That inputs are rotated, and of which layers, is ours.

Source: arXiv 2605.05914; OFT, arXiv 2306.07280; names and numbers as in PEFT's OFT with use_cayley_neumann
False, which has the same rotation but adapts no Conv1D. Training and merging are ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.experts import layers_beside_experts
from qpa.adapters.kind import Rates, Request
from qpa.adapters.peft_directory import (
    MODULE_FIELDS,
    Fields,
    PeftDirectory,
    check_names,
    common_config,
    is_count,
    is_one_of,
)
from qpa.adapters.weight_kind import WeightKind
from qpa.compat.peft_ import KEY_PREFIX
from qpa.documents import AdapterSpec, AdapterTensor, FrozenAdapter, TensorRules
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, short
from qpa.documents.tensors import Role, Shape
from qpa.errors import ExportError, OptionError
from qpa.models.linear_layers import Layer, layers_of_mixers

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.weight_change import Blocks, WeightChange
    from qpa.store.tensor_file import TensorFile

ANGLES = Role("oft_R", "row", is_weight=True, has_rank=False)


def n_angles(block_size: int) -> int:
    """Return how many numbers a skew-symmetric matrix has: those above its diagonal."""
    return block_size * (block_size - 1) // 2


def _check(shapes: Sequence[Shape], rank: int) -> None:
    ((_, n_numbers),) = shapes
    if rank < 2 or n_numbers % n_angles(rank):
        raise ValueError(f"{n_numbers} numbers are not those of whole blocks of {rank}")


def _check_shared(shapes: Sequence[Shape], rank: int) -> None:
    _check(shapes, rank)
    ((_, n_numbers),) = shapes
    if n_numbers != n_angles(rank):
        raise ValueError(f"{n_numbers} numbers are not those of one block of {rank}")


RULES = TensorRules(roles=(ANGLES,), check=_check)
SHARED_RULES = TensorRules(roles=(ANGLES,), check=_check_shared)


class _Directory(PeftDirectory):
    """An OFT directory of the exact Cayley transform, with a row of oft_R for every block."""

    is_shared: ClassVar[bool] = False

    tag: ClassVar[str] = "oft"
    fields: ClassVar[Fields] = {
        **MODULE_FIELDS,
        "bias": is_one_of("none"),
        "block_share": is_one_of(False),
        "coft": is_one_of(False),
        "fan_in_fan_out": is_one_of(False),
        "module_dropout": is_one_of(0.0),
        "oft_block_size": is_count,
        "peft_type": is_one_of("OFT"),
        "r": is_one_of(0),
        "use_cayley_neumann": is_one_of(False),
    }

    def config(self, frozen: FrozenAdapter) -> JsonObject:
        """Return the config of an OFT in blocks of the adapter's size."""
        return common_config(frozen) | {
            "bias": "none",
            "block_share": self.is_shared,
            "coft": False,
            "fan_in_fan_out": False,
            "module_dropout": 0.0,
            "oft_block_size": frozen.rank,
            "peft_type": "OFT",
            "r": 0,
            "target_modules": sorted(frozen.target_modules),
            "use_cayley_neumann": False,
        }

    def refuse(self, frozen: FrozenAdapter) -> None:
        """Refuse Conv1D, on which PEFT has no OFT."""
        if frozen.fan_in_fan_out:
            raise ExportError(
                "`format` peft", "linear layers", "Conv1D, on which PEFT has no OFT", "use merged or onnx"
            )

    def shapes(self, frozen: FrozenAdapter) -> dict[str, tuple[int, ...]]:
        """Return the shapes, with a row for each block."""
        width = n_angles(frozen.rank)
        return {KEY_PREFIX + tensor.path: (tensor.n_numbers // width, width) for tensor in frozen.tensors}

    def check(self, config: JsonObject, file: TensorFile) -> Iterator[Finding]:
        """Yield modules whose oft_R is missing or is of blocks of another size."""
        size = config["oft_block_size"]
        assert isinstance(size, int)
        end = f".{ANGLES.name}.weight"
        shapes = {
            key.removeprefix(KEY_PREFIX).removesuffix(end): entry.shape for key, entry in file.entries.items()
        }
        yield from check_names(file.entries, {f"{KEY_PREFIX}{m}{end}" for m in shapes}, shapes, config)
        for module, shape in sorted(shapes.items()):
            if len(shape) != 2 or shape[1] != n_angles(size):
                expected = f"[n, {n_angles(size)}], blocks of {size}"
                yield Finding("L24", short(module), expected, str(list(shape)))


@final
class _SharedDirectory(_Directory):
    """The same with a single row, and block_share."""

    is_shared: ClassVar[bool] = True
    fields: ClassVar[Fields] = {**_Directory.fields, "block_share": is_one_of(True)}


class Cayley(WeightKind):
    """Cayley: one row of numbers in every module."""

    name: ClassVar[str] = "cayley"
    title: ClassVar[str] = "Cayley"
    rules: ClassVar[TensorRules] = RULES
    default_rank: ClassVar[int] = 4
    peft: ClassVar[PeftDirectory] = _Directory()
    formats: ClassVar[tuple[str, ...]] = ("peft", "merged", "onnx")
    reason: ClassVar[str] = "which changes a weight at full rank"
    default_generator: ClassVar[str] = "direct"
    rate: ClassVar[float] = 3e-2
    direct_rates: ClassVar[Rates] = (1e-2, 3e-2, 1e-1)
    direct_sizes: ClassVar[tuple[Request, ...]] = tuple(
        Request(rank=rank) for rank in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    )

    def words(self, rank: int) -> str:
        """Return "Cayley, blocks of 4"."""
        return f"{self.title}, blocks of {rank}"

    def phrase(self, rank: int) -> str:
        """Return "a Cayley rotation in blocks of 4"."""
        return f"a {self.title} rotation in blocks of {rank}"

    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the linear layers whose names PEFT does not take for experts, and that no mixer has.

        A mixer may use a weight without a call of its layer, and then no input is rotated.
        """
        of_mixers = layers_of_mixers(model)
        return {path: layer for path, layer in layers_beside_experts(model).items() if path not in of_mixers}

    def check_rank(self, layers: Mapping[str, Layer], rank: int | None) -> int:
        """Return the size of blocks that was asked for; else the largest that fits, up to the default.

        Raises:  OptionError: it does not divide the inputs of a layer, or nothing does.
        """
        divisor = math.gcd(*(layer.n_in for layer in layers.values()))
        fitting = [size for size in range(2, divisor + 1) if divisor % size == 0]
        if not fitting:
            sides = " and ".join(str(n) for n in sorted({layer.n_in for layer in layers.values()})[:2])
            advice = "name fewer layers"
            raise OptionError("targets", "layers whose inputs have a common divisor", sides, advice)
        if rank is not None and rank not in fitting:
            path = next(path for path, layer in layers.items() if rank < 2 or layer.n_in % rank)
            expected = f"a size of blocks, from 2 on, that divides the {layers[path].n_in} inputs of {path}"
            near = min(fitting, key=lambda size: abs(size - rank))
            raise OptionError("rank", expected, str(rank), f"{near} divides those of every layer")
        small = [size for size in fitting if size <= self.default_rank]
        return rank or (small or fitting)[-1 if small else 0]

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[Shape]:
        """Return the shape of oft_R: the numbers of all blocks in one row."""
        return ((1, layer.n_in // rank * n_angles(rank)),)

    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a `RotatedModel`."""
        from qpa.adapters.rotated_model import RotatedModel

        return RotatedModel(model, spec.tensors, spec.rank)

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name in a `RotatedModel`."""
        return f"model.{tensor.path}"

    def sides(self, arrays: FrozenArrays, module: str) -> tuple[int | None, int | None]:
        """Return None and in_features."""
        (numbers,) = arrays.of_module(module)
        size = arrays.frozen.rank
        return None, numbers.n_numbers // n_angles(size) * size

    def weight_change(
        self, arrays: FrozenArrays, module: str, blocks: Blocks, *, transposed: bool
    ) -> WeightChange:
        """Return W R^T, or R W^T for a transposed weight, with R from float64."""
        import torch

        from qpa.adapters.rotated_model import rotations
        from qpa.adapters.weight_change import WeightChange

        (tensor,) = arrays.of_module(module)
        numbers = torch.from_numpy(arrays.read(tensor.path)).double()
        turn = rotations(numbers, arrays.frozen.rank).float()
        if transposed:
            return WeightChange(row_turn=turn.numpy())
        return WeightChange(column_turn=turn.mT.numpy())


@final
class SharedCayley(Cayley):
    """Cayley with the same block all along the inputs of a module."""

    name: ClassVar[str] = "cayley-shared"
    title: ClassVar[str] = "shared Cayley"
    rules: ClassVar[TensorRules] = SHARED_RULES
    rate: ClassVar[float] = 1e-1
    direct_rates: ClassVar[Rates] = (3e-2, 1e-1, 3e-1)
    peft: ClassVar[PeftDirectory] = _SharedDirectory()

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[Shape]:
        """Return the shape of oft_R: the numbers of one block."""
        return ((1, n_angles(rank)),)

    def sides(self, arrays: FrozenArrays, module: str) -> tuple[int | None, int | None]:
        """Return no side: as many blocks follow one another as a layer has inputs for."""
        return None, None


KIND = Cayley()
SHARED = SharedCayley()
