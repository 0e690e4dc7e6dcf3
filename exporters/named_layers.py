"""Formats whose engines name a model's layers in their own way: which adapters they can carry.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Collection

from qpa.documents import FrozenAdapter
from qpa.errors import ExportError
from qpa.exporters.cards.model_card import targets_head


def check_layers(
    frozen: FrozenAdapter,
    architectures: Collection[str],
    *,
    conv1d: str,
    no_head: str,
    headless: Collection[str] = (),
) -> None:
    """Refuse Conv1D, an architecture that is not known, and a tied head.

    Args:    conv1d, no_head: why the engine has no place for these.
             headless: architectures on whose head the engine takes no adapter.
    Raises:  ExportError: one of them.
    """
    base = frozen.base
    if frozen.fan_in_fan_out:
        raise ExportError(base.name_or_path, "linear layers", f"Conv1D, {conv1d}", "use --format merged")
    if base.architecture not in architectures:
        expected = f"one of {', '.join(architectures)}"
        raise ExportError(base.name_or_path, expected, base.architecture, "use --format merged")
    if targets_head(frozen) and (base.ties_lm_head or base.architecture in headless):
        raise ExportError(
            f"the output head of {base.name_or_path}",
            "a head with a weight of its own",
            f"one tied to the input embedding, for which {no_head}",
            "choose targets without the head",
        )
