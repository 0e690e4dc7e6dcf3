"""Verification: what independent readers made of an exported directory."""

from __future__ import annotations

from typing import ClassVar

from qpa.documents.base import Document, Record


class EngineCheck(Record):
    """One engine's answer to the probe.

    Args:    engine: "peft" or "transformers".
             max_logit_difference: largest |engine - live| over the probe's logits, float32.
             max_base_difference: largest |engine - base model| over the same logits.
             greedy_tokens_equal: the greedy continuation is the live model's.
             missing_keys, unexpected_keys: as the engine reported them.
    """

    engine: str
    max_logit_difference: float
    max_base_difference: float
    greedy_tokens: tuple[int, ...]
    greedy_tokens_equal: bool
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]


class Verification(Document):
    """The result of verify-adapter; it exists only when every check passed."""

    kind: ClassVar[str] = "verification"

    engines: tuple[EngineCheck, ...]
    tolerance: float
