"""The static contract of an exported directory; each format adds rules of its own to these.

Rules beside those of `qpa.exporters.contracts.manifest`:
L21  An export has the files its format consists of, and no LoRA directory calls itself something else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from qpa.compat.peft_ import WEIGHTS_FILE
from qpa.documents import MANIFEST_PATH, Manifest, read_manifest
from qpa.documents.finding import Finding, short
from qpa.documents.manifest import FORMATS
from qpa.errors import DocumentError, VerificationError
from qpa.exporters.contracts.lora import check_lora_contract
from qpa.exporters.contracts.manifest import check_files, check_manifest


def check_contract(directory: Path) -> tuple[Finding, ...]:
    """Check a directory of any origin, without torch and without the base model.

    A directory without a manifest is taken for a LoRA, which has a contract for every origin.

    Args:    directory: it is only read; hostile content gives findings, never an exception.
    Returns: all findings; () when the contract is kept.
    Source:  ours.
    """
    if not (directory / MANIFEST_PATH).is_file():
        return check_lora_contract(directory)
    try:
        manifest = read_manifest(directory)
    except DocumentError as error:
        return (Finding("L20", MANIFEST_PATH, short(error.expected), short(error.found)),)
    return FORMATS[manifest.format].findings(directory, manifest)


def broken_contract(directory: Path, findings: Sequence[Finding]) -> VerificationError:
    """Return the error that says how many rules a directory breaks, and the first one."""
    found = f"{len(findings)} findings: {findings[0]}"
    return VerificationError(str(directory), "the contract to be kept", found)


def check_export(directory: Path, manifest: Manifest, files: Collection[str]) -> Iterator[Finding]:
    """Yield the broken rules that are the same for every format.

    Args:    files: those that an export of the manifest's format has at least.
    Source:  ours.
    """
    yield from check_files(directory)
    yield from check_manifest(directory)
    listed = {entry.file for entry in manifest.files}
    for name in sorted({*files} - listed):
        yield Finding("L21", name, f"a file of every export as {manifest.format}", "none in the manifest")
    if WEIGHTS_FILE in listed and WEIGHTS_FILE not in files:
        yield Finding("L21", WEIGHTS_FILE, f"no LoRA directory in an export as {manifest.format}", "one")
