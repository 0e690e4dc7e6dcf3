"""A store: a folder with thousands of compact adapters, each a file whose name is the adapter's.

Rules:
1. A name has 1 to 128 letters, digits, dots, dashes and underscores of ASCII, and starts with a letter or a
   digit: it names no hidden file, and no file in another folder. "layouts" is no name.
2. `layouts/<digest>.json` holds the layout of each size of adapter once.
3. What is no plain file is no adapter; a link counts as the file that it leads to, where that lies in the
   store's own folder.
4. Whoever lists a store reads the head of each file alone.

Source: ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Self

from qpa.errors import DirectoryError, DocumentError, QpaError
from qpa.serve.basis import Basis
from qpa.serve.compact import MAX_BYTES, Compact, head_of
from qpa.serve.decoding import lengths
from qpa.serve.files import read_whole
from qpa.serve.layout import DIRECTORY as LAYOUTS
from qpa.serve.layout import Layout
from qpa.store.atomic_files import write_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME_WORDS = "1 to 128 letters, digits, dots, dashes and underscores, with a letter or digit first"


@dataclass(frozen=True)
class Entry:
    """An adapter of a store, as far as the head of its file tells.

    Args:    n_numbers: how many numbers were trained.
             n_bytes: the size of the file.
             basis, layout: SHA-256 digests in hexadecimal.
    """

    name: str
    n_numbers: int
    n_bytes: int
    basis: str
    layout: str


@dataclass(frozen=True)
class Store:
    """A folder of compact adapters."""

    directory: Path

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Return the store in a folder.

        Raises:  DirectoryError: there is no such folder.
        """
        if not directory.is_dir():
            raise DirectoryError(str(directory), "a folder of compact adapters", "no folder")
        return cls(directory)

    def path_of(self, name: str) -> Path:
        """Return the file of an adapter.

        Raises:  DocumentError: that is no name, or the store has no such adapter.
        """
        if not is_name(name):
            raise DocumentError(f"adapter {name[:200]}", _NAME_WORDS, "another name")
        path = self.find(name)
        if path is None:
            place = str(self.directory / name)
            raise DocumentError(place, "a compact adapter", "no file in the store's own folder")
        return path

    def find(self, name: str) -> Path | None:
        """Return the file of an adapter; None where that is no name, or the store has no such adapter."""
        path = self.directory / name if is_name(name) else None
        return path if path is not None and _is_inside(path, self.directory) else None

    def layout_path(self, digest: str) -> Path:
        """Return where the layout with a SHA-256 digest in hexadecimal is kept."""
        return self.directory / LAYOUTS / f"{digest}.json"

    def names(self) -> list[str]:
        """Return the names of all adapters in alphabetical order."""
        with os.scandir(self.directory) as found:
            return sorted(
                entry.name
                for entry in found
                if is_name(entry.name) and (entry.is_file(follow_symlinks=False) or self._leads_inside(entry))
            )

    def entries(self) -> Iterator[Entry]:
        """Yield all adapters in alphabetical order, of each of which the head is read.

        One that is removed meanwhile is left out.

        Raises:  DocumentError: a file is no compact adapter.
        """
        for name in self.names():
            try:
                yield self.entry(name)
            except (DocumentError, FileNotFoundError):
                if self.find(name) is not None:
                    raise

    def entry(self, name: str) -> Entry:
        """Return what the head of an adapter's file tells.

        Raises:  DocumentError: it is no compact adapter, or the store has none of this name.
        """
        path = self.path_of(name)
        with path.open("rb") as stream:
            head = head_of(str(path), stream)
            n_bytes = os.fstat(stream.fileno()).st_size
        return Entry(name, sum(head.lengths), n_bytes, head.basis.hex(), head.layout.hex())

    def add(self, files: Sequence[Path], *, force: bool = False) -> list[Entry]:
        """Copy compact files into the store under their own names, and their layouts.

        All files are checked before the first is written.

        Args:    files: each with its layout in the folder `layouts` beside it.
                 force: whether an adapter of the same name is replaced.
        Raises:  DocumentError: a file, its layout or its name is wrong, or the name is taken by another.
        """
        checked = [(path.name, *self._checked(path, force)) for path in files]
        _check_apart(files, [compact for _, compact, *_ in checked])
        for name, compact, layout, digest in checked:
            beside = self.layout_path(digest)
            if not beside.is_file() or beside.read_bytes() != layout:
                write_file(beside, layout)
            write_file(self.directory / name, compact)
        return [self.entry(name) for name, *_ in checked]

    def verify(self, basis: Basis | None = None) -> Iterator[str]:
        """Yield one line for everything that is wrong.

        Every file is read whole: it is a compact adapter, its layout is there and is the one it was written
        with, and has as many numbers as the file.

        Args:    basis: of which all adapters are to be; None where that is not asked.
        """
        checking = _Checking(basis)
        with os.scandir(self.directory) as found:
            others = sorted(e.name for e in found if not is_name(e.name) and not _is_ours(e.name))
        for name in others:
            yield str(
                DocumentError(str(self.directory / name), _NAME_WORDS, "another name; no server finds it")
            )
        for name in self._all_names():
            try:
                path = self.path_of(name)
                checking.check(path, Compact.read(path))
            except QpaError as error:
                yield str(error)
            except OSError as error:
                yield f"{self.directory / name}: {error.strerror or error}"

    def _all_names(self) -> list[str]:
        with os.scandir(self.directory) as found:
            return sorted(entry.name for entry in found if is_name(entry.name))

    def _checked(self, path: Path, force: bool) -> tuple[bytes, bytes, str]:
        """Return a compact file, its layout, and the layout's digest."""
        if not is_name(path.name):
            raise DocumentError(str(path), _NAME_WORDS, "another name", "rename the file")
        content = read_whole(path, MAX_BYTES)
        compact = Compact.parse(str(path), content)
        _Checking(None).check(path, compact)
        there = self.directory / path.name
        if os.path.lexists(there) and not force and (not there.is_file() or there.read_bytes() != content):
            raise DocumentError(str(there), "a name that is not taken", "another adapter", "use `force`")
        layout = path.parent / LAYOUTS / f"{compact.layout.hex()}.json"
        return content, layout.read_bytes(), compact.layout.hex()

    def _leads_inside(self, entry: os.DirEntry[str]) -> bool:
        return entry.is_symlink() and _is_inside(Path(entry.path), self.directory)


@dataclass
class _Checking:
    """Checks adapters; each layout is read once."""

    basis: Basis | None
    known: dict[bytes, Layout] = field(default_factory=dict)

    def check(self, path: Path, compact: Compact) -> None:
        """Check what one file says.

        Raises:  DocumentError: its layout or its basis is wrong, or its size.
        """
        if self.basis is not None:
            self.basis.check_own(str(path), compact.basis, compact.bank)
        layout = self.known.get(compact.layout) or Layout.read(path, compact.layout)
        self.known[compact.layout] = layout
        expected = lengths(layout, are_probabilities=compact.are_probabilities)
        if (found_lengths := [len(array) for array in compact.arrays]) != expected:
            raise DocumentError(
                str(path), f"arrays of {expected} numbers, as its layout has", str(found_lengths)
            )


def _check_apart(files: Sequence[Path], contents: Sequence[bytes]) -> None:
    """Check that no two adapters have one name.

    Raises:  DocumentError: two do.
    """
    found: dict[str, bytes] = {}
    for path, content in zip(files, contents, strict=True):
        if found.setdefault(path.name, content) != content:
            raise DocumentError(
                str(path), "a name for each adapter", "the name of another", "rename the file"
            )


def is_name(name: str) -> bool:
    """Return whether an adapter may have a name."""
    return name != LAYOUTS and _NAME.fullmatch(name) is not None


def _is_inside(path: Path, directory: Path) -> bool:
    """Return whether a path is a plain file that lies in a directory when all links are followed."""
    try:
        real = path.resolve(strict=True)
        return real.parent == directory.resolve() and is_name(real.name) and S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError):
        return False


def _is_ours(name: str) -> bool:
    """Return whether a store's folder has such an entry besides adapters."""
    return name == LAYOUTS or name.startswith(".")
