"""The static contract of an exported directory, by the format its manifest names."""

from __future__ import annotations

from pathlib import Path

from qpa.documents import MANIFEST_PATH, read_manifest
from qpa.errors import DocumentError
from qpa.exporters.lora_contract import check_lora_contract
from qpa.exporters.manifest_contract import Finding, check_manifest


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
        return (Finding("L20", MANIFEST_PATH, error.expected, error.found),)
    return check_lora_contract(directory) if manifest.format == "lora" else tuple(check_manifest(directory))
