"""From a compact adapter and its basis to a plain LoRA, as `qpa export --format lora` writes it in float32.

    python -m qpa.serve.expansion FILE BASIS OUT

The bytes are the same in every process and on every machine, see `qpa.serve.decoding`. One tensor at a time
is in memory.

Source: ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qpa.errors import DirectoryError, DocumentError, QpaError
from qpa.serve.arithmetic import Array
from qpa.serve.basis import Basis
from qpa.serve.compact import Compact
from qpa.serve.decoding import Decoded, Shape, decode, lengths, tensors_of
from qpa.serve.layout import Layout
from qpa.store.atomic_files import check_absent, new_directory
from qpa.store.disk_space import room_for

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def expand(compact: Path, basis: Basis, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new directory, whole or not at all.

    Where another process makes the same directory meanwhile, that one is kept.

    Raises:  DocumentError: the compact file, its layout or the basis is damaged, or they are not of each
             other.
             DirectoryError: there is something at `out`, or it cannot be written.
             DiskFullError: there is no room; nothing is left behind.
    """
    groups, bank = groups_of(compact, basis)
    check_absent(out)
    try:
        with new_directory(out, keep_existing=True) as work:
            (work / CONFIG_FILE).write_bytes(basis.config_text)
            shapes = {basis.keys[path]: shape for path, shape in basis.shapes.items()}
            _write(work / WEIGHTS_FILE, shapes, _tensors(groups, basis, bank))
    except OSError as error:
        if isinstance(error, QpaError):
            raise
        words = error.strerror or type(error).__name__
        raise DirectoryError(str(out), "a directory that can be written", words) from error


def tensors(compact: Path, basis: Basis) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of adapter_model.safetensors by their keys, in order of these, float32.

    Raises:  DocumentError: see `expand`.
    """
    groups, bank = groups_of(compact, basis)
    yield from _tensors(groups, basis, bank)


def groups_of(compact: Path, basis: Basis) -> tuple[Sequence[Decoded], int]:
    """Read a compact file and its layout, and decode the features.

    Returns: the groups of the layout, and the number of the adapter's bank.
    Raises:  DocumentError: one is damaged, or of another basis.
    """
    found, layout = read(compact, basis)
    return decode(layout, found.arrays, are_probabilities=found.are_probabilities), found.bank


def read(compact: Path, basis: Basis | None = None) -> tuple[Compact, Layout]:
    """Read a compact file and its layout.

    Args:    basis: of which it has to be; None where that is not asked.
    Raises:  DocumentError: one is damaged, they are not of each other, or of another basis.
    """
    found = Compact.read(compact)
    if basis is not None:
        _check_basis(compact, found, basis)
    layout = Layout.read(compact, found.layout)
    wanted = lengths(layout, are_probabilities=found.are_probabilities)
    present = [len(array) for array in found.arrays]
    if present != wanted:
        raise DocumentError(str(compact), f"arrays of {_words(wanted)} numbers", _words(present))
    return found, layout


def _check_basis(compact: Path, found: Compact, basis: Basis) -> None:
    if found.basis != basis.digest:
        expected = f"the basis {found.basis.hex()[:12]}.., with which {compact.name} was trained"
        advice = "give that one, or export again"
        raise DocumentError(str(basis.directory), expected, f"{basis.digest.hex()[:12]}..", advice)
    basis.check_bank(str(compact), found.bank)


def _words(counts: Sequence[int]) -> str:
    text = ", ".join(f"{n}" for n in counts[:8])
    return f"{text} .. ({len(counts)} arrays)" if len(counts) > 8 else text or "no"


def _tensors(groups: Sequence[Decoded], basis: Basis, bank: int) -> Iterator[tuple[str, Array]]:
    shapes = {path: basis.shapes[path] for path in sorted(basis.shapes, key=basis.keys.__getitem__)}
    scale = np.float32(basis.scale)
    with basis.reading(bank) as reading:
        for path, tensor in tensors_of(shapes, reading.initial, reading.bases, groups):
            if path not in basis.first_factors and scale != 1:
                with np.errstate(over="ignore"):
                    tensor *= scale
                if not np.all(np.isfinite(tensor)):
                    raise DocumentError(path, "finite float32 numbers", "one too large")
            yield basis.keys[path], tensor


def _write(path: Path, shapes: Mapping[str, Shape], found: Iterator[tuple[str, Array]]) -> None:
    """Write a safetensors file, float32, with names in order, as `qpa.store.tensor_file` does."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * shapes[name].n_rows * shapes[name].n_columns
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    with room_for(path, 8 + len(content) + end), path.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        for _, tensor in found:
            stream.write(np.ascontiguousarray(tensor, "<f4").data)


def main(arguments: Sequence[str]) -> int:
    """Expand one file; return the exit code."""
    if len(arguments) != 3:
        print("usage: python -m qpa.serve.expansion FILE BASIS OUT", file=sys.stderr)
        return 2
    compact, basis, out = map(Path, arguments)
    try:
        expand(compact, Basis.open(basis), out)
    except QpaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
