"""What all export formats have in common: what a format says of itself, and how an export is made.

Source: ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, get_args

from qpa.adapters.experts import has_experts
from qpa.adapters.registry import KINDS
from qpa.documents import (
    MANIFEST_PATH,
    Attachment,
    BaseModelReference,
    Document,
    FrozenAdapter,
    Manifest,
    WeightLayout,
)
from qpa.documents.finding import Finding
from qpa.documents.manifest import DtypeName
from qpa.errors import DiskFullError, ExportError, OptionError, one_of
from qpa.exporters.cards.model_card import CARDS, render_card, targets_head
from qpa.exporters.contracts.export import check_export
from qpa.exporters.contracts.manifest import collected
from qpa.exporters.directory import CARD_FILE, PROBE_FILE, ExportDirectory, check_output
from qpa.models.base_model import check_base, load_config, moved_base
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.atomic_files import TEMPORARY_PREFIX, new_directory, remove_leftovers

INT16 = "int16"


def dtype_option() -> Any:
    """Declare the field `dtype` of an exporter, which says in `dtypes` which of the choices it has."""
    return option(
        "float32",
        help="Type of the numbers: {choices}.",
        choices=(*get_args(DtypeName), INT16),
        choice_words=lambda name: (
            "rounded to 65,535 steps, of trained numbers alone" if name == INT16 else ""
        ),
    )


class Exported(Protocol):
    """What there is to say of an export: a manifest, or what a file without one is known to be.

    Args:    format, method, dtype, base, rank, files: see `Manifest`.
    """

    @property
    def format(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def base(self) -> BaseModelReference: ...
    @property
    def rank(self) -> int: ...
    @property
    def files(self) -> tuple[Attachment, ...]: ...


class Format(ABC):
    """A frozen dataclass whose fields are its options, of which `dtype` is one.

    Class attributes: those of `qpa.documents.manifest.ExportFormat`; `words` say what it is and for whom;
    `dtypes` are the types it can write;
    `kinds` are names of adapter kinds that it carries although the kinds do not name it themselves, as a
    format from outside may; `reads_base_model` says whether it needs the base model; `carries_all` says that
    it has a place for a LoRA on experts of a mixture, or on an embedding, too; `needs_basis` that it is for
    adapters on a shared basis only.
    """

    __slots__ = ()

    name: ClassVar[str]
    words: ClassVar[str] = ""
    requires: ClassVar[tuple[type[Document], ...]] = ()
    files: ClassVar[tuple[str, ...]]
    engines: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ()
    section: ClassVar[str] = "export"
    dtypes: ClassVar[tuple[str, ...]] = get_args(DtypeName)
    is_file: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    any_origin: ClassVar[bool] = False
    reads_base_model: ClassVar[bool] = False
    carries_all: ClassVar[bool] = False
    needs_basis: ClassVar[bool] = False
    dtype: str
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abstractmethod
    def emit(
        self, frozen: FrozenAdapter, out: Path, context: PassContext, *, force: bool = False
    ) -> Exported:
        """Write an export whole or not at all.

        Args:    context: of the run.
                 force: replace an export of this sort that is already there.
        """

    @classmethod
    def refusal_of(cls, layout: WeightLayout) -> ExportError | None:
        """Return why the format cannot hold what a layout gives; None where it can."""
        return None

    @classmethod
    @abstractmethod
    def check_output(cls, out: Path, *, force: bool) -> None:
        """Check that an export may be written to `out`.

        Raises:  ExportError: something is in the way.
        """

    @classmethod
    @abstractmethod
    def findings(cls, directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
        """Return the broken rules of the format's contract.

        Hostile content gives findings, never an exception.
        """

    def check_options(self) -> None:
        """Check the options before there is an adapter.

        Raises:  OptionError: one is out of range, or the format does not have the type.
        """
        if self.dtype not in self.dtypes:
            format_ = f" with `format` {self.name}" if len(self.dtypes) == 1 else ""
            raise OptionError("dtype", one_of(self.dtypes) + format_, self.dtype)
        check_options(self)

    def check_run(self, frozen: FrozenAdapter, context: PassContext) -> None:
        """Refuse, before anything is written, a run whose adapter the format cannot carry.

        Raises:  ExportError: with the reason, and the format that can.
        """
        kind = KINDS[frozen.method]
        if self.name not in kind.formats and kind.name not in self.kinds:
            carried = [KINDS[name].title for name in KINDS if self.name in KINDS[name].formats]
            carried += [KINDS[name].title for name in self.kinds]
            advice = f"use {one_of(kind.formats)}" if kind.formats else ""
            found = f"{kind.title}, {kind.reason}" if kind.reason else kind.title
            raise ExportError(f"`format` {self.name}", one_of(carried or ["no kind"]), found, advice)
        others = "experts" if has_experts(frozen.modules) else ", ".join(frozen.embeddings)
        if others and not self.carries_all:
            expected, advice = "an adapter on linear layers of their own", "use lora, merged or onnx"
            raise ExportError(f"`format` {self.name}", expected, f"one on {others}", advice)

    def card(self, frozen: FrozenAdapter, rank: int) -> str:
        """Return the README.md of an adapter that was written with a rank; of a file, what a report says."""
        template = (CARDS / f"{self.name}.md").read_text()
        fields = self.card_fields(frozen, rank)
        return render_card(template, frozen, rank=rank, dtype=self.dtype, fields=fields)

    def card_fields(self, frozen: FrozenAdapter, rank: int) -> dict[str, str]:
        """Return what only the card of this format says."""
        return {}


@dataclass(frozen=True)
class ExportedFile:
    """What there is to say of a file that was exported from a run; see `Exported`.

    Args:    files: what lies beside it, and itself last, paths relative to its directory.
    """

    format: str
    method: str
    dtype: str
    base: BaseModelReference
    rank: int
    files: tuple[Attachment, ...]


class FileFormat(Format):
    """A format whose exports are files without a manifest; what there is to say of one, its run says."""

    __slots__ = ()

    is_file: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def found(cls, frozen: FrozenAdapter, out: Path, context: PassContext) -> ExportedFile | None:
        """Return what was exported from a run to `out`; None where that is not what the run gives."""

    @classmethod
    def findings(cls, directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
        """Return that no directory is such a file, whatever its manifest says."""
        return (Finding("L21", MANIFEST_PATH, "a format whose exports are directories", manifest.format),)


class Exporter(Format):
    """A format whose exports are directories, each with a manifest."""

    __slots__ = ()

    def emit(
        self, frozen: FrozenAdapter, out: Path, context: PassContext, *, force: bool = False
    ) -> Manifest:
        """Write an export whole or not at all.

        Args:    out: a new or empty directory.
                 context: its file store holds the adapter's arrays and probe.
                 force: replace an export of qpa that is already there. A directory that is anything
                 else, or holds anything else, is never removed.
        Returns: the manifest, as it stands in the directory.
        Raises:  OptionError: an option is out of range, or the format does not have the type.
                 ExportError: the format cannot carry this adapter or its kind, numbers that are not
                 finite, arrays that are not the document's, an output that is in the way or cannot be
                 written.
                 DocumentError: the arrays or the probe are missing or damaged.
        """
        self.check_options()
        self.check_run(frozen, context)
        remove_leftovers(out.parent)  # which may put an export back
        self.check_output(out, force=force)
        probe = context.files.get(frozen.probe).read_bytes()
        try:
            with new_directory(out) as work, _verified(frozen.arrays, context):
                directory = ExportDirectory(work)
                rank = self.write(frozen, context, directory)
                directory.write(CARD_FILE, self.card(frozen, rank).encode())
                directory.write(PROBE_FILE, probe)
                manifest = _manifest(self, frozen, rank, directory.files, context)
                directory.write_manifest(manifest)
                self.check_output(out, force=force)  # again: this may have taken minutes
        except DiskFullError as error:
            raise ExportError(error.subject, error.expected, error.found, error.advice) from error
        except OSError as error:
            found = error.strerror or type(error).__name__
            if error.filename and not _is_of_output(Path(str(error.filename)), out):
                raise ExportError(str(error.filename), "a file that can be read", found) from error
            raise ExportError(str(out), "a directory that can be written", found) from error
        return manifest

    @classmethod
    def check_output(cls, out: Path, *, force: bool) -> None:
        """See `qpa.exporters.directory.check_output`."""
        check_output(out, force=force)

    @classmethod
    def findings(cls, directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
        """Return the broken rules of the format's contract."""
        of_all = check_export(directory, manifest, cls.files)
        return collected(chain(of_all, cls.check_content(directory, manifest)), "L20", directory)

    @classmethod
    def check_content(cls, directory: Path, manifest: Manifest) -> Iterator[Finding]:
        """Yield the broken rules that this format has beside those of every export."""
        yield from ()

    def check_run(self, frozen: FrozenAdapter, context: PassContext) -> None:
        """Refuse a kind that the format cannot carry, and what `check` refuses."""
        super().check_run(frozen, context)
        self.check(frozen)

    def check(self, frozen: FrozenAdapter) -> None:
        """Refuse, before anything is written, what the format cannot carry or engines serve wrongly.

        Raises:  ExportError: with the reason, and the format that can.
        """

    @abstractmethod
    def write(self, frozen: FrozenAdapter, context: PassContext, directory: ExportDirectory) -> int:
        """Write the format's own files.

        Returns: the rank that was written.
        Raises:  ExportError, DocumentError: something is wrong with the arrays or the base model.
        """


@dataclass(frozen=True, slots=True)
class BaseModelExporter(Exporter):
    """An exporter that reads the base model.

    Args:    dtype: of what is written.
             model: where the base model is now; None for where the adapter says.
             trust_remote_code: the user allows the model's own Python code to run, now.
    """

    reads_base_model: ClassVar[bool] = True

    dtype: str = dtype_option()
    model: str | None = option(
        None, help="Base model to read.", shown_default="the one it was trained on", provenance=False
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def base_and_config(self, frozen: FrozenAdapter) -> tuple[BaseModelReference, Any]:
        """Return where the base model is now, and its config in transformers.

        Raises:  ModelError: the base is not there, or not the one the adapter was planned for.
        """
        base = moved_base(frozen.base, self.model)
        check_base(base, trust_remote_code=self.trust_remote_code)
        name, allowed = base.name_or_path, base.trust_remote_code
        return base, load_config(name, revision=base.revision, trust_remote_code=allowed)


@dataclass(frozen=True, slots=True)
class OtherNamesExporter(BaseModelExporter):
    """An exporter for an engine that gives a model's layers names of its own.

    Class attributes: `architectures` are those whose names are known; `headless` those of them on whose head
    the engine takes no adapter; `no_conv1d` and `no_tied_head` say why it has no place for these.
    """

    architectures: ClassVar[Collection[str]]
    headless: ClassVar[Collection[str]] = ()
    no_conv1d: ClassVar[str]
    no_tied_head: ClassVar[str]

    def check(self, frozen: FrozenAdapter) -> None:
        """Refuse Conv1D, an architecture that is not known, and a tied head.

        Raises:  ExportError: the adapter is on one of them.
        """
        base = frozen.base
        if frozen.fan_in_fan_out:
            found = f"Conv1D, {self.no_conv1d}"
            raise ExportError(base.name_or_path, "linear layers", found, "use `format` merged")
        if base.architecture not in self.architectures:
            expected = f"one of {', '.join(self.architectures)}"
            raise ExportError(base.name_or_path, expected, base.architecture, "use `format` merged")
        if targets_head(frozen) and (base.ties_lm_head or base.architecture in self.headless):
            raise ExportError(
                f"the output head of {base.name_or_path}",
                "a head with a weight of its own",
                f"one tied to the input embedding, for which {self.no_tied_head}",
                "choose targets without the head",
            )


def _is_of_output(path: Path, out: Path) -> bool:
    """Return whether a path is in an output under its name or a temporary one, or is a directory above it."""
    path, out = path.resolve(), out.resolve()
    if path.is_relative_to(out) or out.is_relative_to(path):
        return True
    beside = path.is_relative_to(out.parent)
    return beside and path.relative_to(out.parent).parts[0].startswith(TEMPORARY_PREFIX)


@contextmanager
def _verified(arrays: Attachment, context: PassContext) -> Iterator[None]:
    """Check a file's digest in a thread while it is read; the result counts only if the digest is right.

    Raises:  DocumentError: the file was changed, whatever else went wrong because of it.
    """
    beside = ThreadPoolExecutor(1)
    verified = beside.submit(context.files.get, arrays)
    try:
        yield
    except Exception:
        verified.result()
        raise
    finally:
        beside.shutdown(wait=False)
    verified.result()


def _manifest(
    exporter: Exporter, frozen: FrozenAdapter, rank: int, files: list[Attachment], context: PassContext
) -> Manifest:
    return Manifest(
        provenance=context.provenance(exporter, frozen),
        format=exporter.name,
        method=frozen.method,
        dtype=cast(DtypeName, exporter.dtype),
        base=frozen.base,
        rank=rank,
        files=tuple(sorted(files, key=lambda entry: entry.file)),
        probe=PROBE_FILE,
        account=frozen.account,
        context=frozen.context,
        result=frozen.result,
    )
