"""A bounded folder of expanded adapters, for all processes of a machine that serve them.

Rules:
1. An entry belongs to the bytes of a compact file and to a basis: its name has the digests of both. A file
   that has changed is another entry.
2. `sources/` keeps the compact file of every entry, and its layout, also after the entry is removed: a
   server that was given an entry's path and asks for it later gets the same adapter, whatever has become of
   the store. A compact file is about a thousandth of what it expands to.
3. Before an entry is handed out its files are compared with the SHA-256 digests that were taken when it was
   made; if they differ, it is made again.
4. Who makes or checks an entry holds a lock, so that processes that ask for the same adapter at once expand
   it once. There are a fixed number of lock files, which stay.
5. Where the entries have more bytes than the bound, those go that were asked for the longest ago, but none
   that was asked for within the last GRACE_S seconds, whatever the bound: a server that was given its path
   may not have opened it yet. Who has opened a file keeps it, as POSIX has it. What cannot be removed stays.
6. Where the disk is full, whatever the bound, all go that may, and what found no room is tried once more.
7. All entries of one basis have the same size, so that one of each is measured: there may be thousands, and
   somebody waits.

Source: ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qpa.errors import DiskFullError
from qpa.serve.basis import Basis
from qpa.serve.compact import MAX_BYTES, Compact
from qpa.serve.expansion import expand
from qpa.serve.files import read_whole
from qpa.serve.layout import DIRECTORY as LAYOUTS
from qpa.serve.layout import Layout
from qpa.store.atomic_files import sha256_of, write_file

DEFAULT_BYTES = 10 << 30
GRACE_S = 60.0

_DIGESTS = "expanded.json"
_N_LOCKS = 256
_ENTRY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")


@dataclass(frozen=True)
class Expanded:
    """An adapter in the cache.

    Args:    path: the directory with adapter_config.json and adapter_model.safetensors.
             digest: SHA-256 of the compact file in hexadecimal.
    """

    path: Path
    digest: str


@dataclass(frozen=True)
class Cache:
    """Expanded adapters of one basis.

    Args:    n_bytes: the bound; DEFAULT_BYTES is 10 GiB.
    """

    directory: Path
    basis: Basis
    n_bytes: int = DEFAULT_BYTES

    def get(self, compact: Path) -> Expanded:
        """Return an adapter, which is expanded where it is not there.

        Args:    compact: a compact file, with its layout beside it in the folder `layouts`.
        Raises:  DocumentError: the file or its layout is damaged, or is of another basis.
                 DiskFullError: there is no room.
        """
        content = read_whole(compact, MAX_BYTES)
        digest = hashlib.sha256(content).hexdigest()

        def get() -> Expanded:
            self._keep(compact, content, digest)
            return self._entry(digest)

        return self._with_room(get)

    def again(self, path: Path) -> bool:
        """Make an entry again where it has been removed.

        Args:    path: that of an entry that was handed out.
        Returns: whether the path is of an entry of this cache, which is there now.
        Raises:  DocumentError, DiskFullError: see `get`.
        """
        digest = digest_of(path)
        if path != self._path(digest) or not self._source(digest).is_file():
            return False
        self._with_room(lambda: self._entry(digest))
        return True

    def _with_room(self, get: Callable[[], Expanded]) -> Expanded:
        try:
            return get()
        except DiskFullError:
            if not self._sweep(0):
                raise
            return get()

    def _entry(self, digest: str) -> Expanded:
        path = self._path(digest)
        with self._lock(digest):
            is_new = not _is_whole(path)
            if is_new:
                self._make(path, digest)
            os.utime(path)
        if is_new:
            self._sweep(self.n_bytes)
        return Expanded(path, digest)

    def _path(self, digest: str) -> Path:
        return self.directory / f"{self.basis.digest.hex()[:16]}-{digest}"

    def _source(self, digest: str) -> Path:
        return self.directory / "sources" / digest

    def _keep(self, compact: Path, content: bytes, digest: str) -> None:
        """Copy a compact file and its layout, where the copies are not there or are damaged."""
        parsed = Compact.parse(str(compact), content)
        self.basis.check_own(str(compact), parsed.basis, parsed.bank)
        Layout.read(compact, parsed.layout)
        name = f"{LAYOUTS}/{parsed.layout.hex()}.json"
        for path, whole in {
            self.directory / "sources" / name: (compact.parent / name).read_bytes(),
            self._source(digest): content,
        }.items():
            if not path.is_file() or path.read_bytes() != whole:
                write_file(path, whole)

    def _make(self, path: Path, digest: str) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        expand(self._source(digest), self.basis, path)
        digests = {file.name: sha256_of(file) for file in sorted(path.iterdir())}
        write_file(path / _DIGESTS, json.dumps(digests, indent=2).encode())

    def _sweep(self, n_bytes: int) -> bool:
        """Remove the entries that were asked for the longest ago, down to a number of bytes.

        Returns: whether there were any to remove.
        """
        entries = self._entries()
        sizes: dict[str, int] = {}
        for entry in entries:  # those of one basis are alike, but for what is left of one
            if not sizes.get(_basis_of(entry.name)):
                sizes[_basis_of(entry.name)] = _size(entry.path)
        total, removed = sum(sizes[_basis_of(entry.name)] for entry in entries), False
        if total > n_bytes:
            oldest_kept = time.time() - GRACE_S
            for used, name in sorted(_used(entries)):
                if total <= n_bytes or used > oldest_kept:
                    break
                if self._remove(self.directory / name, used):
                    total, removed = total - sizes[_basis_of(name)], True
        return removed

    def _entries(self) -> list[os.DirEntry[str]]:
        """Return the entries of all bases."""
        with contextlib.suppress(OSError), os.scandir(self.directory) as found:
            return [entry for entry in found if _ENTRY.fullmatch(entry.name)]
        return []

    def _remove(self, path: Path, used: float) -> bool:
        """Remove an entry that nobody has asked for since; return whether it is gone."""
        # It may be gone already, or be a link, or another user's.
        with contextlib.suppress(OSError), self._lock(digest_of(path), wait=False) as is_held:
            if is_held and path.stat().st_mtime == used:
                shutil.rmtree(path)
                return True
        return False

    @contextlib.contextmanager
    def _lock(self, digest: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of an entry; yield whether it is held, which it always is after waiting."""
        place = self.directory / "locks" / f"{int(digest[:8], 16) % _N_LOCKS:02x}"
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def digest_of(path: Path) -> str:
    """Return the SHA-256 of the compact file, in hexadecimal, whose entry has a path."""
    return path.name.partition("-")[2]


def _basis_of(name: str) -> str:
    return name.partition("-")[0]


def _used(entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[float, str]]:
    """Yield when each entry was last asked for, and its name."""
    for entry in entries:
        with contextlib.suppress(OSError):
            yield entry.stat().st_mtime, entry.name


def _size(path: str) -> int:
    with contextlib.suppress(OSError), os.scandir(path) as found:
        return sum(file.stat().st_size for file in found)
    return 0


def _is_whole(path: Path) -> bool:
    """Return whether the files of an entry are those that were made."""
    try:
        digests = json.loads((path / _DIGESTS).read_text())
        return bool(digests) and all(sha256_of(path / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False
