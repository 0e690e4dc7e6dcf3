"""The files of an ONNX export besides the graph: the adapter, and the model's config and tokenizer.

Source: ours; onnxruntime's documentation of LoRA adapters.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpa.documents.base import json_text
from qpa.exporters.directory import ExportDirectory
from qpa.store.disk_space import room_for
from qpa.store.tensor_file import Array

OPSET = 20
GRAPH_FILE = "model.onnx"
ADAPTER_FILE = "adapter.onnx_adapter"

_OF_THE_LOADING = ("is_local", "local_files_only")
"""What transformers writes into tokenizer_config.json about how the tokenizer came to be loaded."""


def write_adapter(tensors: Mapping[str, Array], path: Path) -> None:
    """Write an adapter in onnxruntime's format.

    Args:    tensors: float32, by the names of the graph's inputs.
             path: of a new file, in a directory that is there.
    Raises:  DiskFullError, OSError: it cannot be written.
    """
    from onnxruntime import AdapterFormat, OrtValue

    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(tensors[name]) for name in sorted(tensors)})
    try:
        with room_for(path, sum(tensor.nbytes for tensor in tensors.values())):
            adapter.export_adapter(str(path))
    except RuntimeError as error:  # onnxruntime says no more of a file it cannot write
        raise OSError(errno.EIO, "onnxruntime cannot write to it") from error


def write_model_files(model: Any, tokenizer: Any, directory: ExportDirectory, folder: str = "") -> None:
    """Write config.json, generation_config.json and the tokenizer's files, without any path of the base.

    Args:    folder: below the directory; "" or a name ending in "/".
    """
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "_name_or_path"}
    directory.write_json(f"{folder}config.json", config)
    if model.generation_config is not None:
        directory.write_json(f"{folder}generation_config.json", model.generation_config.to_diff_dict())
    for name in tokenizer.save_pretrained(directory.path / folder):
        written = Path(name)
        if written.name == "tokenizer_config.json":
            config = json.loads(written.read_bytes())
            written.write_bytes(json_text({key: config[key] for key in config if key not in _OF_THE_LOADING}))
        if written.is_file():
            directory.take(written.relative_to(directory.path).as_posix())
