"""What the manifest of an export promises, checked file by file; and how broken rules are collected.

L02  Every file is readable by everyone (safetensors writes mode 0600 whatever the umask).
L03  No pickle file.
L20  The manifest is valid, no file is missing or extra, and every SHA-256 is right. What `qpa verify` found
     is the one file that the manifest does not list: it has a digest of its own, which is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from qpa.documents import MANIFEST_PATH, read_manifest
from qpa.documents.finding import Finding, several, short
from qpa.documents.verification import VERIFICATION_PATH, read_verification
from qpa.errors import DocumentError
from qpa.store.atomic_files import sha256_of

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def check_files(directory: Path) -> Iterator[Finding]:
    """Yield a finding for files that others cannot read, and one for files that can hold a pickle.

    Source:  ours.
    """
    files = sorted(entry for entry in directory.rglob("*") if entry.is_file())
    names = {path: str(path.relative_to(directory)) for path in files}
    modes = {path: path.stat().st_mode & 0o777 for path in files}
    if private := [path for path in files if modes[path] & 0o444 != 0o444]:
        expected, found = "a file readable by everyone (mode 0644)", f"mode {modes[private[0]]:04o}"
        yield Finding("L02", several(names[path] for path in private), expected, found)
    if pickles := [names[path] for path in files if path.suffix.lower() in _PICKLE_SUFFIXES]:
        yield Finding("L03", several(pickles), "safetensors only", "a file type that can hold a pickle")


def check_manifest(directory: Path) -> Iterator[Finding]:
    """Yield what differs from the manifest of a directory, nothing where there is no manifest.

    Source:  ours.
    """
    if not (directory / MANIFEST_PATH).is_file():
        return
    try:
        manifest = read_manifest(directory)
    except DocumentError as error:
        yield Finding("L20", MANIFEST_PATH, short(error.expected), short(error.found))
        return
    listed = {entry.file: entry for entry in manifest.files}
    present = {
        file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()
    }
    for name, entry in listed.items():
        if name not in present:
            yield Finding("L20", short(name), "a file, as the manifest lists it", "nothing")
        elif present[name].stat().st_size != entry.n_bytes:
            n_bytes = present[name].stat().st_size
            yield Finding("L20", short(name), f"{entry.n_bytes} bytes", f"{n_bytes} bytes")
        elif (sha256 := sha256_of(present[name])) != entry.sha256:
            yield Finding("L20", short(name), f"SHA-256 {entry.sha256[:16]}..", f"{sha256[:16]}..")
    # The Hub and its client add hidden files (.gitattributes, .cache), which no engine reads.
    visible = {name for name in present if not name.startswith(".")}
    for name in sorted(visible - {*listed, MANIFEST_PATH, VERIFICATION_PATH}):
        yield Finding("L20", short(name), "only files the manifest lists", "another file")
    try:
        read_verification(directory)
    except DocumentError as error:
        yield Finding("L20", VERIFICATION_PATH, short(error.expected), short(error.found))


def collected(findings: Iterable[Finding], rule: str, directory: Path) -> tuple[Finding, ...]:
    """Return findings as a tuple; a directory that cannot be read gives one more, and no exception.

    Args:    rule: the one that such a directory breaks.
    """
    try:
        return tuple(findings)
    except (OSError, MemoryError) as error:
        found = short(getattr(error, "strerror", None) or type(error).__name__)
        return (Finding(rule, short(directory), "a readable directory", found),)
