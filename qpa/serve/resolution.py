"""From an adapter's name to the directory of its plain LoRA, as four environment variables say.

    QPA_STORE        the folder of compact adapters
    QPA_BASIS        the directory of the basis that they were trained on
    QPA_CACHE        the folder for expanded adapters; ~/.cache/qpa where it is not set
    QPA_CACHE_BYTES  how many bytes of them are kept; 10 GiB where it is not set

Source: ours.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from qpa.errors import OptionError
from qpa.serve.basis import Basis
from qpa.serve.cache import DEFAULT_BYTES, Cache, Expanded, digest_of
from qpa.serve.store import Store
from qpa.store.atomic_files import sha256_of


@dataclass
class Adapters:
    """The adapters of a store, expanded when they are asked for.

    Args:    basis, cache: directories; the basis is opened with the first adapter.
             n_bytes: the cache's bound.
    """

    store: Store
    basis: Path
    cache: Path
    n_bytes: int = DEFAULT_BYTES
    _opened: Cache | None = field(default=None, init=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Self | None:
        """Return what the variables describe; None where QPA_STORE is not set.

        Raises:  OptionError: a variable is missing or wrong.
        """
        if not variables.get("QPA_STORE"):
            return None
        if not variables.get("QPA_BASIS"):
            raise OptionError(
                "QPA_BASIS", "the directory that qpa basis wrote, since QPA_STORE is set", "none"
            )
        basis = Path(variables["QPA_BASIS"]).absolute()
        if not (basis / "basis.json").is_file():
            raise OptionError("QPA_BASIS", "a directory with a basis.json", str(basis))
        text = variables.get("QPA_CACHE_BYTES") or str(DEFAULT_BYTES)
        if not (text.isascii() and text.isdecimal()):
            raise OptionError("QPA_CACHE_BYTES", "a whole number of bytes", text)
        folder = Path(variables["QPA_STORE"]).absolute()
        if not folder.is_dir():
            raise OptionError("QPA_STORE", "a folder of compact adapters", f"no folder {folder}")
        store = Store.open(folder)
        return cls(store, basis, _cache_folder(variables.get("QPA_CACHE")), int(text))

    @property
    def base(self) -> str:
        """Return the base model's name in the basis.

        Raises:  DocumentError: the basis is wrong.
        """
        return self._cache().basis.base

    def expanded(self, name: str) -> Expanded | None:
        """Return an adapter's directory; None where the store has no such adapter.

        Raises:  QpaError: the adapter, its layout or the basis is wrong, or there is no room.
                 OSError: something cannot be read or written.
        """
        path = self.store.find(name)
        return None if path is None else self._cache().get(path)

    def again(self, path: Path) -> None:
        """Make a directory that was handed out again, where the cache has dropped it.

        Where the whole cache was removed, the store is looked through for the same file.

        Args:    path: the directory; one outside the cache is left alone.
        Raises:  QpaError, OSError: see `expanded`.
        """
        if path.parent != self.cache or self._cache().again(path):
            return
        digest = digest_of(path)
        for name in self.store.names():
            if self._has(name, digest):
                self.expanded(name)
                return

    def _has(self, name: str, digest: str) -> bool:
        """Return whether an adapter's file has a digest; not if it is gone meanwhile, or cannot be read."""
        file = self.store.find(name)
        with contextlib.suppress(OSError):
            return file is not None and sha256_of(file) == digest
        return False

    def _cache(self) -> Cache:
        with self._opening:
            if self._opened is None:
                self._opened = Cache(self.cache, Basis.open(self.basis), self.n_bytes)
            return self._opened


def _cache_folder(said: str | None) -> Path:
    """Return the folder for expanded adapters, which is made.

    Raises:  OptionError: there is no home directory for it, or nothing can be written into it.
    """
    try:
        folder = Path(said or "~/.cache/qpa").expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        words = getattr(error, "strerror", None) or str(error)
        found = f"{said or 'none'}: {words}"
        raise OptionError("QPA_CACHE", "a folder that can be written", found) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError("QPA_CACHE", "a folder that can be written", f"{folder}, which cannot")
    return folder
