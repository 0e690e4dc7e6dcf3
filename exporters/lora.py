"""lora: a LoRA directory in the form that every serving engine reads alike.

Rules:
1. lora_alpha == r: the scaling alpha / r is multiplied into lora_B in float32. A scaling of 1 leaves
   its bits untouched.
2. Tensors are named base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r],
   float32, contiguous; target_modules is an explicit sorted list.
3. The directory appears whole or not at all; qpa/manifest.json is written last.
4. Only the frozen adapter decides the bytes: no time, no path of the output, no option of the machine.
5. The result keeps `qpa.exporters.lora_contract`.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qpa import __version__
from qpa.atomic_files import new_directory
from qpa.documents import (
    MANIFEST_PATH,
    Attachment,
    Document,
    FrozenAdapter,
    Manifest,
    PassOption,
    Provenance,
    read_manifest,
)
from qpa.errors import DocumentError, ExportError
from qpa.exporters.lora_contract import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from qpa.exporters.model_card import model_card, targets_head
from qpa.pipeline import PassContext

PROBE_FILE = "qpa/probe.safetensors"
CARD_FILE = "README.md"

Array = npt.NDArray[np.float32]


@final
@dataclass(frozen=True, slots=True)
class ExportLora:
    """Write a frozen adapter as a LoRA directory.

    Args:    allow_tied_head: export an adapter on an output head that shares its weight with the input
             embedding, although an engine that merges it then computes something else.
    Source:  ours.
    """

    name: ClassVar[str] = "lora"
    consumes: ClassVar[type] = FrozenAdapter
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = Manifest

    allow_tied_head: bool = False

    def emit(
        self, frozen: FrozenAdapter, out: Path, context: PassContext, *, force: bool = False
    ) -> Manifest:
        """Write the directory whole or not at all.

        Args:    out: a new or empty directory.
                 context: its file store holds the adapter's arrays and probe.
                 force: replace an export of qpa that is already there. A directory that is anything
                 else, or holds anything else, is never removed.
        Returns: the manifest, as it stands in the directory.
        Raises:  ExportError: a tied head, numbers that are not finite, arrays
                 that are not the document's, an output that is in the way or cannot be written.
                 DocumentError: the arrays or the probe are missing or damaged.
        """
        self._check(frozen)
        check_output(out, force=force)
        arrays = _read_arrays(frozen, context.files.get(frozen.arrays))
        probe = context.files.get(frozen.probe).read_bytes()
        contents = {
            CARD_FILE: model_card(frozen).encode(),
            CONFIG_FILE: _json_bytes(adapter_config(frozen)),
            WEIGHTS_FILE: save(_exported_tensors(frozen, arrays), metadata={"format": "pt"}),
            PROBE_FILE: probe,
        }
        manifest = self._manifest(frozen, contents)
        try:
            with new_directory(out) as work:
                for name, content in contents.items():
                    _write(work / name, content)
                _write(work / MANIFEST_PATH, manifest.to_json())
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise ExportError(str(out), "a directory that can be written", found) from error
        return manifest

    def _check(self, frozen: FrozenAdapter) -> None:
        if targets_head(frozen) and frozen.base.ties_lm_head and not self.allow_tied_head:
            raise ExportError(
                f"the output head of {frozen.base.name_or_path}",
                "a head with a weight of its own",
                "one tied to the input embedding, so an engine that merges the adapter gives wrong tokens",
                "choose targets without the head, or pass --allow-tied-head",
            )

    def _manifest(self, frozen: FrozenAdapter, contents: dict[str, bytes]) -> Manifest:
        return Manifest(
            provenance=Provenance(
                pass_name=self.name,
                options=(PassOption(name="allow_tied_head", value=self.allow_tied_head),),
                seed=frozen.provenance.seed,
                qpa_version=__version__,
                parent=frozen.digest,
            ),
            format="lora",
            base=frozen.base,
            rank=frozen.rank,
            files=tuple(
                Attachment(file=name, sha256=hashlib.sha256(content).hexdigest(), n_bytes=len(content))
                for name, content in sorted(contents.items())
            ),
            probe=PROBE_FILE,
            account=frozen.account,
            result=frozen.result,
        )


def check_output(out: Path, *, force: bool) -> None:
    """Check that an export may be written to `out`.

    Raises:  ExportError: a file; an export of qpa without `force`; or a directory that is none, or
             holds files that are not the export's own, with or without `force`.
    """
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ExportError(str(out), "a new directory", "a file")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        manifest = read_manifest(out)
    except DocumentError as error:
        raise ExportError(
            str(out), "a new or empty directory", "a directory that is no qpa export"
        ) from error
    own = {entry.file for entry in manifest.files} | {MANIFEST_PATH}
    present = {entry.relative_to(out).as_posix() for entry in out.rglob("*") if not entry.is_dir()}
    if foreign := sorted(present - own):
        raise ExportError(str(out), "a directory with nothing but a qpa export", f"{foreign[0]} in it")
    if not force:
        raise ExportError(str(out), "a new directory", "an existing export", "pass --force to replace it")


def adapter_config(frozen: FrozenAdapter) -> dict[str, object]:
    """Return the content of adapter_config.json."""
    return {
        "base_model_name_or_path": frozen.base.name_or_path,
        "bias": "none",
        "fan_in_fan_out": frozen.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": frozen.rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": frozen.rank,
        "revision": frozen.base.revision,
        "target_modules": sorted(frozen.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _exported_tensors(frozen: FrozenAdapter, arrays: dict[str, Array]) -> dict[str, Array]:
    scaling = np.float32(frozen.alpha / frozen.rank)
    tensors = {}
    for path, array in arrays.items():
        folded = _scaled(array, scaling) if path.endswith(".lora_B.weight") else array
        if not np.all(np.isfinite(folded)):
            raise ExportError(path, "finite numbers", "NaN or infinity", "train again with a smaller step")
        tensors[KEY_PREFIX + path] = np.ascontiguousarray(folded)
    return tensors


def _scaled(array: Array, scaling: np.float32) -> Array:
    if scaling == 1:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array * scaling


def _read_arrays(frozen: FrozenAdapter, path: Path) -> dict[str, Array]:
    try:
        arrays: dict[str, Array] = load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise ExportError(str(path), "a safetensors file of float32 tensors", str(error)) from error
    expected = {tensor.path: tensor.shape for tensor in frozen.tensors}
    for name in sorted(expected.keys() ^ arrays.keys()):
        found = "none" if name in expected else "a tensor the document does not name"
        raise ExportError(name, f"the {len(expected)} tensors of the frozen adapter", found)
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.shape != expected[name]:
            wanted = f"float32{list(expected[name])}"
            raise ExportError(name, wanted, f"{array.dtype}{list(array.shape)}")
    return arrays


def _json_bytes(content: dict[str, object]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
