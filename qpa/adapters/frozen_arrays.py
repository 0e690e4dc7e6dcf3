"""A frozen adapter's numbers as exporters want them: scaling folded in, padded, cast, and finite.

Rules:
1. LoRA's scaling alpha / rank is multiplied into lora_B in float32, so that no format has to carry it. A
   scaling of 1 leaves the bits alone.
2. Padding adds rows of zeros to lora_A and columns of zeros to lora_B.
3. A cast rounds to nearest even, last of all; what does not fit the type is refused, never infinite.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qpa.documents import EMBEDDING_ROLES, FrozenAdapter, TensorShape
from qpa.errors import DocumentError, ExportError, OptionError
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import DTYPES, Array, TensorFile

SAFETENSORS_TYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class FrozenArrays:
    """The tensors of a frozen adapter, read one at a time.

    Args:    rank: at least the adapter's; more is padding.
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
        Raises:  OptionError: a multiple below 1.
                 DocumentError: the file is missing or cut short.
                 ExportError: its tensors are not the document's.
        """
        if rank_pad < 1:
            raise OptionError("--rank-pad", "a whole number of at least 1", str(rank_pad))
        path = context.files.path_of(frozen.arrays)
        try:
            file = TensorFile.open(path)
        except DocumentError as error:
            raise ExportError(str(path), "a safetensors file of float32 tensors", error.found) from error
        _check_names(frozen, file)
        return cls(frozen, file, dtype, -(-frozen.rank // rank_pad) * rank_pad)

    def shape(self, tensor: TensorShape) -> tuple[int, int]:
        """Return a tensor's shape with the padding."""
        n_rows, n_columns = tensor.shape
        if _is_a(tensor.path):
            return (self.rank, n_columns)
        return (n_rows, self.rank) if _is_b(tensor.path) else tensor.shape

    def sides(self, module: str) -> tuple[int | None, int | None]:
        """Return out_features and in_features of an adapted module; None is one the adapter does not tell."""
        if self.frozen.method == "ia3":
            n_out, n_in = self._shapes[f"{module}.ia3_l"]
            return (None, n_in) if n_out == 1 else (n_out, None)
        a, b = self._pair(module)
        return self._shapes[b][0], self._shapes[a][1]

    def factors(self, module: str) -> tuple[Array, Array]:
        """Return lora_A [rank, in] and lora_B [out, rank] of a module, as `read` gives them."""
        a, b = self._pair(module)
        return self.read(a), self.read(b)

    def _pair(self, module: str) -> tuple[str, str]:
        names = EMBEDDING_ROLES if module in self.embeddings else ("lora_A.weight", "lora_B.weight")
        return f"{module}.{names[0]}", f"{module}.{names[1]}"

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Return the adapted modules that are embeddings."""
        return frozenset(self.frozen.embeddings)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {tensor.path: tensor.shape for tensor in self.frozen.tensors}

    def read(self, path: str) -> Array:
        """Return one tensor, of the type that was asked for.

        Raises:  ExportError: a number is, or becomes, NaN or infinity.
        """
        array = self.file.read(path)
        if _is_b(path) and (scaling := np.float32(self.frozen.alpha / self.frozen.rank)) != 1:
            with np.errstate(over="ignore", invalid="ignore"):
                array *= scaling
        n_missing = self.rank - self.frozen.rank
        if n_missing and (_is_a(path) or _is_b(path)):
            array = np.pad(array, ((0, n_missing), (0, 0)) if _is_a(path) else ((0, 0), (0, n_missing)))
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(DTYPES[SAFETENSORS_TYPE[self.dtype]], copy=False)
        if not np.all(np.isfinite(cast)):
            if np.all(np.isfinite(array)):
                found, advice = f"one too large: {np.abs(array).max():.1e}", "use bfloat16 or float32"
            else:
                found, advice = "NaN or infinity", "train again with a smaller step"
            raise ExportError(path, f"finite {self.dtype} numbers", found, advice)
        return cast


def _is_a(path: str) -> bool:
    return path.endswith((".lora_A.weight", f".{EMBEDDING_ROLES[0]}"))


def _is_b(path: str) -> bool:
    return path.endswith((".lora_B.weight", f".{EMBEDDING_ROLES[1]}"))


def _check_names(frozen: FrozenAdapter, file: TensorFile) -> None:
    expected = {tensor.path: tensor.shape for tensor in frozen.tensors}
    for name in sorted(expected.keys() ^ file.entries.keys()):
        found = "none" if name in expected else "a tensor the document does not name"
        raise ExportError(name, f"the {len(expected)} tensors of the frozen adapter", found)
    for name, entry in file.entries.items():
        if entry.dtype != "F32" or entry.shape != expected[name]:
            raise ExportError(name, f"F32{list(expected[name])}", f"{entry.dtype}{list(entry.shape)}")
