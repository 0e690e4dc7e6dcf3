"""A frozen adapter's numbers as exporters want them: scaling folded in, padded, cast, and finite.

Rules:
1. The scaling alpha / rank of a product is multiplied into lora_B in float32, so that no format has to carry
   it. A scaling of 1 leaves the bits alone.
2. Padding adds rows of zeros to lora_A and columns of zeros to lora_B.
3. A cast is the last step and rounds to nearest even; a number that does not fit the type is refused.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qpa.documents import TENSOR_RULES, FrozenAdapter, TensorRef
from qpa.errors import DocumentError, ExportError, OptionError
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import DTYPES, Array, TensorFile

SAFETENSORS_TYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class FrozenArrays:
    """The tensors of a frozen adapter, read one at a time.

    Args:    rank: the rank that is written; what is above the adapter's own rank is padding.
    """

    frozen: FrozenAdapter
    file: TensorFile
    dtype: str
    rank: int

    @classmethod
    def open(
        cls, frozen: FrozenAdapter, context: PassContext, *, dtype: str = "float32", rank_pad: int = 1
    ) -> FrozenArrays:
        """Check that the arrays' names and shapes are those of the document; `Exporter` checks their digest.

        Args:    dtype: "float32", "bfloat16" or "float16".
                 rank_pad: pad the rank to a multiple of it.
        Raises:  OptionError: `rank_pad` is below 1.
                 DocumentError: the file is missing or cut short.
                 ExportError: its tensors are not the document's.
        """
        if rank_pad < 1:
            raise OptionError("rank_pad", "a whole number of at least 1", str(rank_pad))
        path = context.files.path_of(frozen.arrays)
        try:
            file = TensorFile.open(path)
        except DocumentError as error:
            raise ExportError(str(path), "a safetensors file of float32 tensors", error.found) from error
        _check_names(frozen, file)
        return cls(frozen, file, dtype, -(-frozen.rank // rank_pad) * rank_pad)

    def of_module(self, module: str) -> tuple[TensorRef, ...]:
        """Return the tensors of an adapted module, in the order of the kind's roles."""
        return self._by_module[module]

    def shape(self, tensor: TensorRef) -> tuple[int, int]:
        """Return a tensor's shape with the padding."""
        n_rows, n_columns = tensor.shape
        if not TENSOR_RULES.role(tensor.role).has_rank:
            return tensor.shape
        return (self.rank, n_columns) if tensor.axis == "row" else (n_rows, self.rank)

    def factors(self, module: str) -> tuple[Array, Array]:
        """Return lora_A [rank, in] and lora_B [out, rank] of a module, as `read` gives them."""
        a, b, *_ = self.of_module(module)
        return self.read(a.path), self.read(b.path)

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Return the adapted modules that are embeddings."""
        return frozenset(self.frozen.embeddings)

    @cached_property
    def _by_path(self) -> dict[str, TensorRef]:
        return {tensor.path: tensor for tensor in self.frozen.tensors}

    @cached_property
    def _by_module(self) -> dict[str, tuple[TensorRef, ...]]:
        members: dict[str, tuple[TensorRef, ...]] = {}
        for tensor in self.frozen.tensors:
            members[tensor.module] = (*members.get(tensor.module, ()), tensor)
        return members

    def read(self, path: str) -> Array:
        """Return one tensor, of the type that was asked for.

        Raises:  ExportError: a number is, or becomes, NaN or infinity.
        """
        tensor, array = self._by_path[path], self.file.read(path)
        scaling = np.float32(self.frozen.alpha / self.frozen.rank)
        if TENSOR_RULES.role(tensor.role).is_scaled and scaling != 1:
            with np.errstate(over="ignore", invalid="ignore"):
                array *= scaling
        missing = [(0, padded - n) for padded, n in zip(self.shape(tensor), tensor.shape, strict=True)]
        if any(n for _, n in missing):
            array = np.pad(array, missing)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(DTYPES[SAFETENSORS_TYPE[self.dtype]], copy=False)
        if not np.all(np.isfinite(cast)):
            if np.all(np.isfinite(array)):
                found, advice = f"one too large: {np.abs(array).max():.1e}", "use bfloat16 or float32"
            else:
                found, advice = "NaN or infinity", "train again with a lower learning rate"
            raise ExportError(path, f"finite {self.dtype} numbers", found, advice)
        return cast


def _check_names(frozen: FrozenAdapter, file: TensorFile) -> None:
    expected = {tensor.path: tensor.shape for tensor in frozen.tensors}
    for name in sorted(expected.keys() ^ file.entries.keys()):
        found = "none" if name in expected else "a tensor the document does not name"
        raise ExportError(name, f"the {len(expected)} tensors of the frozen adapter", found)
    for name, entry in file.entries.items():
        if entry.dtype != "F32" or entry.shape != expected[name]:
            raise ExportError(name, f"F32{list(expected[name])}", f"{entry.dtype}{list(entry.shape)}")
