"""The rule that genai_config.json keeps, as qpa exports it.

L22  genai_config.json names no library and no provider: onnxruntime-genai would load code from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qpa.documents.finding import Finding, short
from qpa.exporters.contracts.lora import MAX_JSON_BYTES

CONFIG_FILE = "genai_config.json"

SESSION_OPTIONS = {"log_id": "onnxruntime-genai", "provider_options": []}
"""The session options of a genai_config.json, all that it may say."""

_PARTS = {
    *("model", "search", "decoder", "session_options", "inputs", "outputs"),
    *("eos_token_id", "bos_token_id", "pad_token_id"),
}
"""The fields that may hold more than one value."""


def check_genai_contract(directory: Path) -> Iterator[Finding]:
    """Yield what the configuration of an exported directory breaks of the rule of this module."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        config = None
    model = config.get("model") if isinstance(config, dict) else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict):
        yield Finding("L22", path.name, "model.decoder, an object", "none")
        return
    if decoder.get("session_options") != SESSION_OPTIONS:
        found = short(decoder.get("session_options"))
        yield Finding("L22", path.name, f"session_options {SESSION_OPTIONS}", found)
    parts = [part for part in (config, model, decoder) if isinstance(part, dict)]
    nested = {key for part in parts for key, value in part.items() if isinstance(value, (dict, list))}
    if unknown := sorted(nested - _PARTS):
        yield Finding("L22", path.name, "parts of a plain decoder", short(", ".join(unknown)))
