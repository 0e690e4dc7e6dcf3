"""The adapter with whose weights another one starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpa.adapters.kind import PlannedAdapter, Request, check_as_before, completed
from qpa.documents import AdapterSpec, BaseModelReference, FrozenAdapter, ParentAdapter
from qpa.errors import DocumentError, OptionError
from qpa.pipeline.pass_protocol import PassContext, newest
from qpa.store.run_directory import DirectoryStore, RunDirectory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Parent:
    """A frozen adapter to go on from.

    Args:    spec, frozen: of its run; files: where its tensors are.
    """

    spec: AdapterSpec
    frozen: FrozenAdapter
    files: DirectoryStore

    @classmethod
    def read(cls, run: Path) -> Parent:
        """Read the documents of a run.

        Raises:  DirectoryError, DocumentError: it is no run, has no frozen adapter, or something is damaged.
        """
        directory = RunDirectory.open(run)
        documents = directory.read_through(FrozenAdapter)
        return cls(newest(documents, AdapterSpec), newest(documents, FrozenAdapter), directory.files)

    def completed(self, asked: Request) -> Request:
        """Return a request with what was asked of the parent where nothing is asked now."""
        return completed(asked, self.spec)

    def check(self, base: BaseModelReference, method: str, planned: PlannedAdapter) -> None:
        """Check that a plan has the parent's base, kind, scale and tensors.

        Raises:  OptionError: it has others.
        """
        whose = "the adapter to continue"
        words = f"the base of {whose}"
        check_as_before(self.frozen, base, method, planned, whose=whose, base_words=words)
        if tuple(tensor.ref for tensor in planned.tensors) != self.frozen.tensors:
            raise OptionError("targets", "the layers of the adapter to continue", "others", "leave it out")

    def copied_to(self, context: PassContext) -> ParentAdapter:
        """Leave the tensors in the context's files, and return what a spec says of the parent."""
        content = self.files.get(self.frozen.arrays).read_bytes()
        arrays = context.files.put("{sha256}.safetensors", content)
        return ParentAdapter(digest=self.frozen.digest, arrays=arrays)


def parent_of(spec: AdapterSpec, context: PassContext) -> dict[str, Tensor] | None:
    """Return the tensors of a spec's parent by path, float32 on the CPU; None where it has none.

    Raises:  DocumentError: they are missing, damaged, or not those of the spec.
    """
    from safetensors.torch import load_file

    if spec.parent is None:
        return None
    path = context.files.get(spec.parent.arrays)
    found: dict[str, Tensor] = load_file(path)
    expected = {tensor.path: tensor.shape for tensor in spec.tensors}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        raise DocumentError(str(path), "the tensors of this plan", "others", "plan again")
    return found
