"""The directory of an export: it appears whole, with a probe and a manifest.

Rules:
1. The directory appears whole or not at all; qpa/manifest.json is written last.
2. It holds the probe, so that any engine's answers can be compared with the live model's.
3. Only the frozen adapter and the exporter's options decide the bytes: no time, no path of the output.
4. An existing directory is replaced on request only, and only if it holds nothing but an export of qpa.

Source: ours.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from qpa.documents import MANIFEST_PATH, Attachment, Manifest, read_manifest
from qpa.documents.base import json_text
from qpa.documents.verification import VERIFICATION_PATH
from qpa.errors import DocumentError, ExportError
from qpa.store.atomic_files import TEMPORARY_PREFIX, sha256_of
from qpa.store.disk_space import room_for
from qpa.store.tensor_file import Array, TensorPlan, write_tensors

PROBE_FILE = "qpa/probe.safetensors"
CARD_FILE = "README.md"


class ExportDirectory:
    """The files of an export while it is being made.

    Args:    path: the path of the temporary directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Attachment] = []

    def write(self, name: str, content: bytes) -> None:
        """Write a file; a name may have folders."""
        self._write(name, content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.files.append(Attachment(file=name, sha256=sha256, n_bytes=len(content)))

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON object, see `json_text`."""
        self.write(name, json_text(content))

    def write_tensors(
        self,
        name: str,
        plans: Iterable[TensorPlan],
        read: Callable[[str], Array],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a safetensors file, see `qpa.store.tensor_file.write_tensors`."""
        written = write_tensors(self._new(name), plans, read, metadata)
        self.files.append(written.model_copy(update={"file": name}))

    def copy(self, name: str, source: Path) -> None:
        """Copy a file, whatever its size."""
        path = self._new(name)
        with room_for(path, source.stat().st_size):
            shutil.copyfile(source, path)
        self.take(name)

    def take(self, name: str) -> None:
        """Add a file that a library has written below `path` to the list of files."""
        path = self.path / name
        self.files.append(Attachment(file=name, sha256=sha256_of(path), n_bytes=path.stat().st_size))

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the list of the files, which does not list itself."""
        self._write(MANIFEST_PATH, manifest.to_json())

    def _write(self, name: str, content: bytes) -> None:
        path = self._new(name)
        with room_for(path, len(content)):
            path.write_bytes(content)

    def _new(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def check_output(out: Path, *, force: bool) -> None:
    """Check that an export may be written to `out`.

    Raises:  ExportError: `out` is a file; it is an export of qpa, and `force` is not given; or it is another
             directory, or holds files that are not the export's own, with or without `force`.
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
    own = {entry.file for entry in manifest.files} | {MANIFEST_PATH, VERIFICATION_PATH}
    present = {
        entry.relative_to(out).as_posix()
        for entry in out.rglob("*")
        if not entry.is_dir() and not entry.name.startswith(TEMPORARY_PREFIX)
    }
    if foreign := sorted(present - own):
        raise ExportError(str(out), "a directory with nothing but a qpa export", f"{foreign[0]} in it")
    if not force:
        raise ExportError(str(out), "a new directory", "an existing export", "pass `force` to replace it")
