"""What the ONNX formats have in common: their numbers, and the order in which their files are made.

Source: ours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.documents import FrozenAdapter
from qpa.errors import one_of
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.format import BaseModelExporter, OtherNamesExporter
from qpa.exporters.onnx.files import OPSET, write_model_files
from qpa.models.base_model import load_model, load_tokenizer, moved_base
from qpa.pipeline.pass_protocol import PassContext

MAKING = "making the ONNX graph"


@dataclass(frozen=True, slots=True)
class OnnxExporter(BaseModelExporter):
    """An exporter of a graph, with the model's config and tokenizer beside it.

    Args:    dtype: "float32".
             model, trust_remote_code: see `BaseModelExporter`.

    Class attributes: `folder` is that of the graph in the export, "" or a name that ends in "/".
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    folder: ClassVar[str] = ""

    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write the adapter, the graph, the model's config and the tokenizer.

        Raises:  ExportError: no graph can be made of the base model, or the adapter does not fit it.
        """
        arrays = FrozenArrays.open(frozen, context)
        self.write_adapter(arrays, directory)
        base = moved_base(frozen.base, self.model)
        model = load_model(base, keep_dtype=False, trust_remote_code=self.trust_remote_code)
        context.progress(MAKING, 0, 1)
        with _naming_other_formats(frozen.method):
            self.write_graph(arrays, model, directory)
        context.progress(MAKING, 1, 1)
        tokenizer = load_tokenizer(base, trust_remote_code=self.trust_remote_code)
        write_model_files(model, tokenizer, directory, self.folder)
        return arrays.rank

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the cards of graphs say."""
        return {"opset": str(OPSET)}

    @abstractmethod
    def write_adapter(self, arrays: FrozenArrays, directory: ExportDirectory) -> None:
        """Write the adapter's own file, where it has one."""

    @abstractmethod
    def write_graph(self, arrays: FrozenArrays, model: Any, directory: ExportDirectory) -> None:
        """Write the graph, and what describes it.

        Args:    model: the base model, float32, which may be changed in place.
        """


@contextmanager
def _naming_other_formats(method: str) -> Iterator[None]:
    """Advise, where a base model has no graph, the formats of a kind of adapter that need none."""
    from qpa.exporters.onnx.graph import NoGraphError

    try:
        yield
    except NoGraphError as error:
        others = formats_without_graph(method)
        raise error.with_advice(f"use `format` {one_of(others)}" if others else "") from error


def formats_without_graph(method: str) -> tuple[str, ...]:
    """Return the formats for engines that carry a kind of adapter, need no graph, and know every base."""
    from qpa.exporters.registry import formats_for, known

    others = [name for name in formats_for(method) if known(name).engines]
    return tuple(name for name in others if not issubclass(known(name), OnnxExporter | OtherNamesExporter))
