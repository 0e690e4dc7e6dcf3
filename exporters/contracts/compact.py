"""The static contract of a compact file: what it expands to keeps that of a LoRA directory.

Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from qpa.documents.finding import Finding
from qpa.exporters.contracts.lora import check_lora_contract
from qpa.serve.basis import Basis
from qpa.serve.expansion import expand


def check_compact(file: Path, basis: Basis) -> tuple[Finding, ...]:
    """Expand a compact file beside it all, and check the LoRA, without torch and without the base model.

    Returns: all findings; () when the contract is kept.
    Raises:  DocumentError: the file, its layout or the basis is damaged, or they are not of each other.
             DiskFullError: there is no room for the LoRA.
    """
    with TemporaryDirectory() as work:
        out = Path(work) / file.name
        expand(file, basis, out)
        return check_lora_contract(out)
