"""The stages export and verify, once for every format that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from qpa.documents import (
    MANIFEST_PATH,
    FrozenAdapter,
    Manifest,
    Verification,
    read_manifest,
)
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import VERIFICATION_PATH, read_verification
from qpa.errors import one_of
from qpa.exporters.contracts.export import broken_contract, check_contract
from qpa.exporters.format import Format
from qpa.exporters.registry import found_file, known
from qpa.passes import verification_pipeline
from qpa.passes.verify_adapter import VerifyAdapter, is_here
from qpa.pipeline.pass_protocol import PassContext
from qpa.progress import Progress
from qpa.store.atomic_files import remove_leftovers
from qpa.store.run_directory import DirectoryStore
from qpa.workflow.changes import changed_options, missing_file
from qpa.workflow.stage import NOT_MADE, Work


class Export:
    """Write the frozen adapter in one format."""

    carries: ClassVar[bool] = False

    def __init__(self, format_: str) -> None:
        self.format = format_
        self.name = f"export {format_}"

    def change(self, work: Work) -> str | None:
        """See `Stage`."""
        out = work.configuration.export_path(self.format)
        if FORMATS[self.format].is_file:
            return self._change_of_file(out, work)
        if not (out / MANIFEST_PATH).is_file():
            return NOT_MADE
        manifest = read_manifest(out)
        if manifest.format != self.format:
            return f"{out} is an export to {manifest.format}"
        frozen = work.run.read(FrozenAdapter)
        if manifest.provenance.parent not in (frozen.digest, work.run.written_digest(FrozenAdapter)):
            return "another adapter is in it"
        words = changed_options(manifest.provenance, self._exporter(work), frozen.provenance.seed)
        return ", ".join(words) or missing_file(manifest, DirectoryStore(out))

    def check(self, work: Work, *, force: bool) -> None:
        """Check, before anything is made, that the directory is free, or an export that this run has made.

        Raises:  ExportError: there is something else.
        """
        out, before = work.configuration.export_path(self.format), work.before
        is_inside = out.resolve().is_relative_to(work.run.path.resolve())
        key = f"export.{self.format}.out"
        is_own = before is not None and self.format in before.formats and before.value(key) == str(out)
        self._exporter(work).check_output(out, force=force or is_inside or is_own)

    def make(self, work: Work) -> str:
        """Write the export."""
        context = work.context(FrozenAdapter)
        frozen = context.document(FrozenAdapter)
        out = work.configuration.export_path(self.format)
        out.parent.mkdir(parents=True, exist_ok=True)
        context = replace(context, seed=frozen.provenance.seed)
        self._exporter(work).emit(frozen, out, context, force=True)
        return str(out)

    def _change_of_file(self, out: Path, work: Work) -> str | None:
        """Return why a file without a manifest has to be written again: it is not what the run gives."""
        if not out.is_file():
            return NOT_MADE
        context, exporter = work.context(FrozenAdapter), self._exporter(work)
        found = found_file(context.document(FrozenAdapter), out, context)
        if found is None:
            return "another adapter is in it"
        if found.dtype != exporter.dtype:
            return f"export.dtype {found.dtype} -> {exporter.dtype}"
        return None

    def _exporter(self, work: Work) -> Format:
        return work.configuration.make(known(self.format))


class Verify:
    """Ask the engines that read a format; where none is installed, check the files alone."""

    carries: ClassVar[bool] = False

    def __init__(self, format_: str) -> None:
        self.format = format_
        self.name = f"verify {format_}"

    def change(self, work: Work) -> str | None:
        """See `Stage`."""
        out = work.configuration.export_path(self.format)
        verification = read_verification(out)
        if verification is None or not verification.is_of(out):
            return NOT_MADE
        step = _for_format(work.configuration.make(VerifyAdapter, directory=str(out)), self.format)
        seed = verification.provenance.seed
        return ", ".join(changed_options(verification.provenance, step, seed)) or None

    def make(self, work: Work) -> str:
        """Verify, and keep the verification in the export.

        Raises:  VerificationError: the export is not what was trained.
        """
        out = work.configuration.export_path(self.format)
        step = _for_format(work.configuration.make(VerifyAdapter, directory=str(out)), self.format)
        readers = FORMATS[self.format].engines
        if step.engines is None and not any(map(is_here, readers)):
            return _check_files(out, readers)
        _, document = ask_engines(step, work.progress)
        DirectoryStore(out).put(VERIFICATION_PATH, document.to_json())
        return _words(document)


def ask_engines(step: VerifyAdapter, progress: Progress) -> tuple[Manifest, Verification]:
    """Verify an export that qpa made, and remove what a killed verification left in it.

    Returns: what the export says of itself, and the verification, which is not kept yet.
    Raises:  what `VerifyAdapter` raises.
    """
    directory = Path(step.directory)
    manifest = read_manifest(directory)
    remove_leftovers((directory / VERIFICATION_PATH).parent)  # which would break the contract
    context = PassContext(manifest.provenance.seed, DirectoryStore(directory), (), progress)
    return manifest, verification_pipeline(step).run(manifest, context).document(Verification)


def _for_format(step: VerifyAdapter, format_: str) -> VerifyAdapter:
    """Return the options with those engines that read a format; where none of them does, with none named."""
    if step.engines is None or step.engines == ("all",):
        return replace(step, engines=None)
    engines = tuple(name for name in step.engines if name in FORMATS[format_].engines)
    return replace(step, engines=engines) if engines else replace(step, engines=None, python=None)


def _check_files(out: Path, readers: tuple[str, ...]) -> str:
    findings = check_contract(out)
    if findings:
        raise broken_contract(out, findings)
    missing = f"{one_of(readers)} is not installed" if readers else "no engine reads it"
    return f"the files keep the contract; {missing}, so nothing was asked for its answers"


def _words(verification: Verification) -> str:
    """Return which engines answered, and how far their logits are from the trained model's."""
    engines = [one.engine for one in verification.engines]
    found = [one.max_logit_difference for one in verification.engines if one.max_logit_difference is not None]
    largest = f"; largest difference of logits {max(found):.1e}" if found else ""
    return f"the trained model's answers in {', '.join(engines)}{largest}"
