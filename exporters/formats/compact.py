"""compact: the trained numbers of an adapter on a shared basis, one file of a few hundred bytes.

Rules:
1. The file is as `qpa.serve.compact` says; its layout lies beside it in `layouts`, once for all adapters of
   one size, under the SHA-256 of its bytes. The layout is written first.
2. Angles are kept where the measurement is exact, and otherwise the probabilities that were measured.
3. The numbers, in float32, are expanded before anything is written: they have to give the frozen adapter,
   bit for bit. Then an expanded file is what the format "lora" writes.
4. A file that is there is replaced on request only, and only if it is a compact adapter.
5. It has no manifest, since thousands of them lie in one directory: what there is to say of it follows from
   its run, which gives the same bytes again.

Source: ours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast, final

from qpa.documents import (
    AdapterSpec,
    Attachment,
    FrozenAdapter,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import DiskFullError, DocumentError, ExportError
from qpa.exporters.cards.model_card import targets_head
from qpa.exporters.format import ExportedFile, FileFormat, dtype_option
from qpa.generators.canonical import TrainedNumbers, refusal, trained_numbers
from qpa.passes.freeze_adapter import kept_probabilities, measured_probabilities
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.compact import NUMBERS, Numbers, is_compact
from qpa.serve.layout import DIRECTORY
from qpa.store.atomic_files import write_file


@final
@dataclass(frozen=True, slots=True)
class ExportCompact(FileFormat):
    """Write the trained numbers of an adapter on a basis.

    Args:    dtype: "float32", or "int16", which rounds them to 65,535 steps.
    Source:  ours.
    """

    name: ClassVar[str] = "compact"
    words: ClassVar[str] = "the trained numbers alone, of an adapter on a basis; see qpa expand"
    files: ClassVar[tuple[str, ...]] = ("<name>", f"{DIRECTORY}/<digest>.json")
    dtypes: ClassVar[tuple[str, ...]] = NUMBERS
    needs_basis: ClassVar[bool] = True

    dtype: str = dtype_option()

    @classmethod
    def check_output(cls, out: Path, *, force: bool) -> None:
        """Check that a compact file may be written to `out`.

        Raises:  ExportError: there is something else, or one, and `force` is not given.
        """
        if out.name == DIRECTORY:
            found = f"{DIRECTORY}, the folder of what adapters of one size share"
            raise ExportError(str(out), "another name for a compact adapter", found)
        if not out.exists() and not out.is_symlink():
            return
        if not out.is_file():
            raise ExportError(str(out), "a new file", "a directory" if out.is_dir() else "something else")
        if not is_compact(out):
            raise ExportError(str(out), "a new file", "a file that is no compact adapter")
        if not force:
            raise ExportError(str(out), "a new file", "a compact adapter", "pass `force` to replace it")

    @classmethod
    def found(cls, frozen: FrozenAdapter, out: Path, context: PassContext) -> ExportedFile | None:
        """Return what was exported from a run to `out`; None where that is not what the run gives.

        Raises:  ExportError: the run has no compact form.
                 DocumentError: a file of the run is missing or damaged.
        """
        if context.document(AdapterSpec).basis is None:
            return None
        numbers = _numbers(context)
        for dtype in NUMBERS:
            files = _files(out, numbers, dtype, context)
            if all(_holds(path, content) for path, content in files.items()):
                return _exported(dtype, frozen, out, files)
        return None

    @classmethod
    def refusal_of(cls, layout: WeightLayout) -> ExportError | None:
        """Refuse numbers that are not expanded without torch."""
        why = refusal(layout)
        return None if why is None else _not_expanded(why)

    def check_run(self, frozen: FrozenAdapter, context: PassContext) -> None:
        """Refuse what no format of LoRA carries, what has no basis, and numbers that are not expanded."""
        self._check_plan(frozen, context)
        why = self.refusal_of(context.document(WeightLayout))
        if why is not None:
            raise why

    def emit(
        self, frozen: FrozenAdapter, out: Path, context: PassContext, *, force: bool = False
    ) -> ExportedFile:
        """Write the file and its layout, each whole or not at all.

        Args:    out: a new file.
                 context: of the run, with all of its documents.
                 force: replace a compact adapter that is there.
        Raises:  OptionError: an option is out of range.
                 ExportError: the adapter has no compact form, or the file is in the way or cannot be written.
                 DocumentError: a file of the run is missing or damaged.
        """
        self.check_options()
        self._check_plan(frozen, context)
        self.check_output(out, force=force)
        numbers = _numbers(context)
        _check_expansion(numbers, frozen, context)
        files = _files(out, numbers, self.dtype, context)
        try:
            for path, content in files.items():
                if path == out:
                    self.check_output(out, force=force)  # again: another may have made it meanwhile
                if not _holds(path, content):
                    write_file(path, content)
        except DiskFullError as error:
            raise ExportError(error.subject, error.expected, error.found, error.advice) from error
        except OSError as error:
            if isinstance(error, ExportError):
                raise
            words = error.strerror or type(error).__name__
            raise ExportError(str(out), "a file that can be written", words) from error
        return _exported(self.dtype, frozen, out, files)

    def _check_plan(self, frozen: FrozenAdapter, context: PassContext) -> None:
        super(ExportCompact, self).check_run(frozen, context)
        if context.document(AdapterSpec).basis is None:
            advice = "plan with `basis`, a directory of qpa basis"
            expected = "an adapter planned on a shared basis"
            raise ExportError(f"`format` {self.name}", expected, "one without", advice)
        if targets_head(frozen) and frozen.base.ties_lm_head:
            found = "one tied to the input embedding, which engines that merge it get wrong"
            raise ExportError(f"the output head of {frozen.base.name_or_path}", "one of its own", found)


def _numbers(context: PassContext) -> TrainedNumbers:
    """Return the trained numbers of a run.

    Raises:  ExportError: they are not expanded.
    """
    from safetensors.torch import load_file

    layout, measurement = context.document(WeightLayout), context.document(Measurement)
    arrays = load_file(context.files.get(context.document(TrainedGenerator).arrays))
    kept = kept_probabilities(layout, measurement, measured_probabilities(measurement, context))
    try:
        return trained_numbers(layout, arrays, kept)
    except DocumentError as error:
        raise _not_expanded(error) from error


def _check_expansion(numbers: TrainedNumbers, frozen: FrozenAdapter, context: PassContext) -> None:
    """Check that trained numbers give the frozen adapter, bit for bit.

    Raises:  ExportError: they give another, or one that is not finite.
    """
    from safetensors.torch import load_file

    from qpa.adapters.attach import initial_adapter

    spec = context.document(AdapterSpec)
    try:
        found = numbers.adapter(spec, initial_adapter(spec))
    except DocumentError as error:
        raise ExportError(error.subject, error.expected, error.found, error.advice) from error
    wanted = load_file(context.files.get(frozen.arrays))
    for path, tensor in found.items():
        if path not in wanted or not tensor.equal(wanted[path]):
            advice = "freeze it again: qpa freeze"
            raise ExportError(path, "the frozen adapter's numbers", "others, of its trained numbers", advice)


def _files(out: Path, numbers: TrainedNumbers, dtype: str, context: PassContext) -> dict[Path, bytes]:
    """Return the layout and the compact file, with their contents, in the order in which they are written."""
    basis, bank = context.document(AdapterSpec).basis, context.document(TrainedGenerator).bank
    assert basis is not None
    compact = numbers.compact(basis.digest, 0 if bank is None else bank.number)
    layout = out.parent / DIRECTORY / f"{numbers.layout.digest.hex()}.json"
    return {layout: numbers.text, out: compact.as_bytes(cast(Numbers, dtype))}


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _exported(dtype: str, frozen: FrozenAdapter, out: Path, files: dict[Path, bytes]) -> ExportedFile:
    attachments = tuple(
        Attachment(
            file=path.relative_to(out.parent).as_posix(),
            sha256=hashlib.sha256(content).hexdigest(),
            n_bytes=len(content),
        )
        for path, content in files.items()
    )
    return ExportedFile(ExportCompact.name, frozen.method, dtype, frozen.base, frozen.rank, attachments)


def _not_expanded(why: DocumentError) -> ExportError:
    subject = f"`format` {ExportCompact.name}"
    return ExportError(subject, f"numbers that are expanded without torch: {why.expected}", why.found)
