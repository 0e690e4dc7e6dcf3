"""Verification: what independent readers made of an exported directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Protocol

from qpa.documents.base import Document, Record, unchanged, with_parents
from qpa.documents.manifest import MANIFEST_PATH, read_in_export, read_manifest
from qpa.registry import Registry

VERIFICATION_PATH = "qpa/verification.json"


class NeededFile(Protocol):
    """A file that an engine needs besides an export, see `qpa.engines.engine.NeededFile`."""

    option: str
    expected: str
    example: str
    advice: str


class EngineRecord(Protocol):
    """What is known of an engine without starting it, see `qpa.engines.engine.EngineRecord`."""

    name: str
    package: str
    file: str
    own_environment: bool
    tolerance: float
    needs: tuple[NeededFile, ...]
    ranks: tuple[int, ...]


ENGINES: Registry[EngineRecord] = Registry(
    "engines",
    {
        "peft": "qpa.engines.peft_engine:ENGINE",
        "transformers": "qpa.engines.transformers_engine:ENGINE",
        "vllm": "qpa.engines.vllm_engine:ENGINE",
        "onnxruntime": "qpa.engines.onnx_engine:ENGINE",
        "onnxruntime-genai": "qpa.engines.genai_engine:ENGINE",
        "llama.cpp": "qpa.engines.llama_cpp_engine:ENGINE",
        "mlx": "qpa.engines.mlx_engine:ENGINE",
    },
)
"""The engines that verify-adapter can ask."""


class EngineCheck(Record):
    """One engine's answer to the probe.

    Args:    engine: the name of the engine as on the command line, such as "peft" or "vllm".
             version: the version of the engine's package; None where the package does not tell it.
             bound: the largest difference from the live model's logits that would have passed.
             max_logit_difference: largest |engine - live| over the probe's logits, float32; None where the
             engine gives no logits.
             max_base_difference: largest |engine - base model| over the same logits.
             greedy_tokens_equal: whether the greedy continuation is the live model's.
             base_tokens_equal: whether it is also the base model's, so that the adapter changes nothing;
             None where there are logits.
             missing_keys, unexpected_keys: the keys that the engine reported.
    """

    engine: str
    version: str | None = None
    bound: float | None = None
    max_logit_difference: float | None
    max_base_difference: float | None
    greedy_tokens: tuple[int, ...]
    greedy_tokens_equal: bool
    base_tokens_equal: bool | None = None
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]


class Verification(Document):
    """The result of verify-adapter; it exists only when every check passed.

    It lives at `qpa/verification.json` inside the export, beside the manifest, which is its parent and does
    not list it. Version 1 knew engines with logits only; version 2 knew neither their versions nor bounds.

    Args:    tolerance: the one that was given, or else that of float32; see `EngineCheck.bound`, which is
             wider where none was given and an engine or the export's type rounds.
    """

    kind: ClassVar[str] = "verification"
    upgrades: ClassVar[tuple[Any, ...]] = (unchanged, with_parents)

    engines: tuple[EngineCheck, ...]
    tolerance: float

    def is_of(self, directory: Path) -> bool:
        """Return whether this is about the export in a directory, and not about one that was there before.

        Raises:  DocumentError: the directory has no manifest.
        """
        upgraded = read_manifest(directory).digest
        # A manifest of an older schema has one digest in its file and another once it is upgraded.
        written = json.loads((directory / MANIFEST_PATH).read_bytes())["digest"]
        return self.provenance.parent in (upgraded, written)


def read_verification(directory: Path) -> Verification | None:
    """Return the verification that is kept in an export; None where there is none.

    Raises:  DocumentError: it is damaged, longer than any verification, or newer than this qpa.
    """
    if not (directory / VERIFICATION_PATH).exists():
        return None
    return read_in_export(directory, VERIFICATION_PATH, Verification, "remove it and run qpa verify again")
