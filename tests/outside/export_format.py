"""An export format from outside: npz, the factors of a LoRA in one NumPy archive.

Rules:
1. factors.npz holds <module>.lora_A [rank, in] and <module>.lora_B [out, rank], float32, for every adapted
   module; the scaling is in lora_B.

Contract:
N01  factors.npz is an archive of arrays that reads without pickle.
N02  Every module has a lora_A and a lora_B of the same rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.documents import FrozenAdapter, Manifest
from qpa.documents.finding import Finding
from qpa.exporters.cards.model_card import render_card
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import Exporter
from qpa.pipeline.pass_protocol import PassContext

FACTORS_FILE = "factors.npz"

CARD = """---
${adapter_of}library_name: numpy
pipeline_tag: text-generation
tags:
- lora
- qpa
---

# NumPy factors made by qpa $version

A rank-$rank LoRA for $base. $origin.

$account

$result
"""


@final
@dataclass(frozen=True, slots=True)
class ExportNpz(Exporter):
    """Write the factors of a LoRA as a NumPy archive.

    Args:    dtype: "float32".
    """

    name: ClassVar[str] = "npz"
    files: ClassVar[tuple[str, ...]] = (FACTORS_FILE,)
    engines: ClassVar[tuple[str, ...]] = ("numpy",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    kinds: ClassVar[tuple[str, ...]] = ("lora",)

    dtype: str = "float32"

    @classmethod
    def check_content(cls, directory: Path, manifest: Manifest) -> Iterator[Finding]:
        """Yield what the archive breaks of the contract."""
        try:
            with np.load(directory / FACTORS_FILE, allow_pickle=False) as archive:
                shapes = {name: archive[name].shape for name in archive.files}
        except ValueError as error:
            yield Finding("N01", FACTORS_FILE, "arrays without pickle", str(error))
            return
        for module in sorted({name.rpartition(".")[0] for name in shapes}):
            a, b = (shapes.get(f"{module}.{role}", ()) for role in ("lora_A", "lora_B"))
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                yield Finding("N02", module, "lora_A [rank, in] and lora_B [out, rank]", f"{a} and {b}")

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write the archive."""
        arrays = FrozenArrays.open(frozen, context, dtype=self.dtype)
        factors = {f"{t.module}.{t.role}": arrays.read(t.path) for t in frozen.tensors}
        np.savez(directory.path / FACTORS_FILE, **factors)
        directory.take(FACTORS_FILE)
        return arrays.rank

    def card(self, frozen: FrozenAdapter, rank: int) -> str:
        """Return the README.md."""
        return render_card(CARD, frozen, rank=rank, dtype=self.dtype)
