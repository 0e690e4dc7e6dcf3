"""Verification: what independent readers made of an exported directory."""

from __future__ import annotations

from typing import Any, ClassVar

from qpa.documents.base import Document, JsonObject, Record


class EngineCheck(Record):
    """One engine's answer to the probe.

    Args:    engine: as on the command line: "peft", "onnxruntime", "vllm" ..
             max_logit_difference: largest |engine - live| over the probe's logits, float32; None where the
             engine gives no logits.
             max_base_difference: largest |engine - base model| over the same logits.
             greedy_tokens_equal: the greedy continuation is the live model's.
             base_tokens_equal: without the adapter the engine says the same; None where there are logits.
             missing_keys, unexpected_keys: as the engine reported them.
    """

    engine: str
    max_logit_difference: float | None
    max_base_difference: float | None
    greedy_tokens: tuple[int, ...]
    greedy_tokens_equal: bool
    base_tokens_equal: bool | None = None
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew engines with logits only."""
    return content


class Verification(Document):
    """The result of verify-adapter; it exists only when every check passed."""

    kind: ClassVar[str] = "verification"
    upgrades: ClassVar[tuple[Any, ...]] = (_upgrade_1,)

    engines: tuple[EngineCheck, ...]
    tolerance: float
