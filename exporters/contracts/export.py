"""The static contract of an exported directory, by the format its manifest names.

Rules beside those of `qpa.exporters.contracts.lora`, `peft_contract` and `manifest_contract`:
L21  An export has the files its format consists of, and no LoRA directory calls itself something else.
L22  genai_config.json names no library and no provider: onnxruntime-genai would load code from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpa.documents import MANIFEST_PATH, Manifest, read_manifest
from qpa.errors import DocumentError
from qpa.exporters.contracts.lora import (
    CONFIG_FILE,
    MAX_JSON_BYTES,
    WEIGHTS_FILE,
    check_lora_contract,
)
from qpa.exporters.contracts.manifest import Finding, check_files, check_manifest, short
from qpa.exporters.contracts.peft import check_peft_contract

FILES = {
    "peft": (CONFIG_FILE, WEIGHTS_FILE),
    "merged": ("config.json",),
    "onnx": ("model.onnx",),
    "onnx-adapter": ("base/model.onnx", "adapter.onnx_adapter"),
    "genai": ("genai_config.json", "model.onnx", "adapter.onnx_adapter"),
    "gguf": ("adapter.gguf",),
    "mlx": ("adapter_config.json", "adapters.safetensors"),
}
"""What an export of each format has at least."""

SESSION_OPTIONS = {"log_id": "onnxruntime-genai", "provider_options": []}
"""The session options of a genai_config.json, all that it may say."""


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
        if manifest.format == "lora":
            return check_lora_contract(directory)
        return tuple(_check(directory, manifest))
    except DocumentError as error:
        return (Finding("L20", MANIFEST_PATH, short(error.expected), short(error.found)),)
    except (OSError, MemoryError) as error:
        found = short(getattr(error, "strerror", None) or type(error).__name__)
        return (Finding("L20", short(directory), "a readable directory", found),)


def _check(directory: Path, manifest: Manifest) -> Iterator[Finding]:
    yield from check_files(directory)
    yield from check_manifest(directory)
    listed = {entry.file for entry in manifest.files}
    for name in sorted({*FILES[manifest.format]} - listed):
        yield Finding("L21", name, f"a file of every export as {manifest.format}", "none in the manifest")
    if manifest.format == "peft" and {*FILES["peft"]} <= listed:
        yield from check_peft_contract(directory, manifest.method)
    elif WEIGHTS_FILE in listed:
        yield Finding("L21", WEIGHTS_FILE, f"no LoRA directory in an export as {manifest.format}", "one")
    if manifest.format == "genai":
        yield from _check_genai(directory / "genai_config.json")


def _check_genai(path: Path) -> Iterator[Finding]:
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


_PARTS: set[Any] = {
    *("model", "search", "decoder", "session_options", "inputs", "outputs"),
    *("eos_token_id", "bos_token_id", "pad_token_id"),
}
