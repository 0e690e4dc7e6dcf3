"""peft: a directory for PEFT of an adapter that is no LoRA: DoRA, IA3, prefix tuning or Cayley.

Rules:
1. Tensors are named and shaped as PEFT saves them, of one type, contiguous; the kind of adapter says how
   (`qpa.adapters.peft_directory`).
2. adapter_config.json has explicit lists of modules. A DoRA's lora_alpha == r: the scaling alpha / r is
   multiplied into lora_B.
3. One tensor at a time is in memory; of a prefix, all of it.
4. The result keeps `qpa.exporters.contracts.peft`.

Source: ours; names as in PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from qpa.adapters.frozen_arrays import SAFETENSORS_TYPE, FrozenArrays
from qpa.adapters.peft_directory import PeftDirectory
from qpa.adapters.registry import KINDS
from qpa.compat.peft_ import CONFIG_FILE, WEIGHTS_FILE
from qpa.documents import FrozenAdapter, Manifest
from qpa.documents.finding import Finding
from qpa.errors import ExportError
from qpa.exporters.cards.model_card import adapter_words
from qpa.exporters.contracts.peft import check_peft_contract
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import Exporter, dtype_option
from qpa.exporters.formats.lora import refuse_tied, tied_head_option
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.tensor_file import TensorPlan


@final
@dataclass(frozen=True, slots=True)
class ExportPeft(Exporter):
    """Write a frozen adapter as a directory that PEFT alone reads.

    Args:    dtype: of the tensors: "float32", "bfloat16" or "float16".
             allow_tied_head: see `ExportLora`.
    Source:  ours.
    """

    name: ClassVar[str] = "peft"
    words: ClassVar[str] = "of other kinds of adapters, for PEFT alone"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE)
    engines: ClassVar[tuple[str, ...]] = ("peft",)

    dtype: str = dtype_option()
    allow_tied_head: bool = tied_head_option()

    @classmethod
    def check_content(cls, directory: Path, manifest: Manifest) -> Iterator[Finding]:
        """Yield what the directory breaks of the contract of its kind of adapter."""
        if {*cls.files} <= {entry.file for entry in manifest.files}:
            yield from check_peft_contract(directory, manifest.method)

    def check(self, frozen: FrozenAdapter) -> None:
        """Refuse a tied head, and what PEFT does not have of the kind.

        Raises:  ExportError: the adapter is on a tied head, and it was not allowed; or PEFT has none such.
        """
        _directory(frozen).refuse(frozen)
        if not self.allow_tied_head:
            refuse_tied(frozen)

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write config and weights."""
        arrays = FrozenArrays.open(frozen, context, dtype=self.dtype)
        rules, kind = _directory(frozen), SAFETENSORS_TYPE[self.dtype]
        shapes = rules.shapes(frozen)
        plans = [TensorPlan(key, kind, shape) for key, shape in shapes.items()]
        directory.write_tensors(
            WEIGHTS_FILE, plans, lambda key: rules.read(arrays, key).reshape(shapes[key]), {"format": "pt"}
        )
        directory.write_json(CONFIG_FILE, rules.config(frozen))
        return frozen.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        rules, words = _directory(frozen), adapter_words(frozen)
        # capitalize() would write IA3 and DoRA in small letters.
        what = words[:1].upper() + words[1:]
        return {"tag": rules.tag, "what_it_is": what, "warning": rules.warning}


def _directory(frozen: FrozenAdapter) -> PeftDirectory:
    """Return what a directory of the adapter's kind holds.

    Raises:  ExportError: PEFT does not have the kind.
    """
    kind = KINDS[frozen.method]
    if kind.peft is None:
        raise ExportError("`format` peft", "a kind of adapter that PEFT has", kind.title)
    return kind.peft
