"""Base graphs that a directory keeps, so that the exports of many adapters share one.

Rules:
1. A base graph depends on the base model's config and weights, the adapted modules and the versions of what
   traces it, and on nothing else: the name of its directory is the digest of these.
2. A file is never overwritten in place, for that ends a process that has it open: the export's directory
   is made aside and renamed.

Source: ours.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx_ir
import onnxscript
import torch
import transformers

from qpa import __version__
from qpa.documents import FrozenAdapter
from qpa.documents.base import digest_of
from qpa.errors import ExportError
from qpa.exporters.onnx.files import GRAPH_FILE, OPSET
from qpa.exporters.onnx.graph import write_graph
from qpa.store.atomic_files import new_directory, sha256_of
from qpa.store.disk_space import room_for

SUMS_FILE = "sha256sums.txt"


def link_base_graph(root: Path, digest: str, trace: Callable[[], onnx_ir.Model], folder: Path) -> list[str]:
    """Link a kept base graph into a folder; where it is not kept yet, it is made first.

    Args:    root: the directory that keeps base graphs.
             digest: what `base_graph_digest` returns.
             trace: makes the graph.
    Returns: the names of the files.
    Raises:  ExportError: the files are not what was written.
    """
    kept = root / digest.removeprefix("sha256:")
    if not kept.is_dir():
        _keep(trace(), kept)
    return _link_all(kept, folder)


def base_graph_digest(frozen: FrozenAdapter, model: Any) -> str:
    """Return the digest of everything a base graph depends on.

    Args:    frozen: its rank and numbers do not count.
             model: the base model with its weights, which two models of one config do not share.
    """
    return digest_of(
        {
            "config": frozen.base.config_digest,
            "weights": _weights_digest(model.state_dict().items()),
            "modules": list(frozen.modules),
            "opset": OPSET,
            "qpa": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnxscript": onnxscript.__version__,
            "onnx_ir": onnx_ir.__version__,
        }
    )


def _weights_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keep(graph: onnx_ir.Model, kept: Path) -> None:
    """Write a graph and its digests to a directory of their own; one that another export made first stays."""
    with new_directory(kept, keep_existing=True) as work:
        names = write_graph(graph, work / GRAPH_FILE)
        sums = "".join(f"{sha256_of(work / name)}  {name}\n" for name in names)
        (work / SUMS_FILE).write_text(sums)


def _link_all(kept: Path, folder: Path) -> list[str]:
    """Link the files of a kept graph, or copy them where the file system cannot; return their names.

    Raises:  ExportError: they are not what was written.
    """
    try:
        sums = [line.split("  ", 1) for line in (kept / SUMS_FILE).read_text().splitlines()]
        broken = [name for sha256, name in sums if sha256_of(kept / name) != sha256]
    except (OSError, ValueError) as error:
        sums, broken = [], [f"{type(error).__name__}"]
    if broken or not sums:
        found = f"another ({broken[0]})" if broken else "none"
        raise ExportError(str(kept), "the base graph that was written here", found, "delete the directory")
    for _, name in sums:
        try:
            os.link(kept / name, folder / name)
        except OSError:
            with room_for(folder / name, (kept / name).stat().st_size):
                shutil.copyfile(kept / name, folder / name)
    return [name for _, name in sums]
