"""A base model's checkpoint: its safetensors files, and which tensor is which module's weight.

Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpa.compat.transformers_ import loaded_names
from qpa.documents import BaseModelReference
from qpa.documents.base import JsonObject
from qpa.errors import ExportError, one_sentence
from qpa.store.tensor_file import TensorFile

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
COPIED = (
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "*.tiktoken", "chat_template*"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
)
"""Patterns of a model's files besides weights, config and code: tokenizer, generation settings, licence."""


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model directory.

    Args:    files: by file name; their headers are read, their numbers are not.
             index: content of model.safetensors.index.json; None for a single file.
    """

    folder: Path
    files: Mapping[str, TensorFile]
    index: JsonObject | None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Find the files as transformers does, and check that every tensor is in one place.

        Raises:  ExportError: there are none, or they are not those of the index.
                 DocumentError: one is missing or damaged.
        """
        if (folder / WEIGHTS_FILE).is_file():
            return cls(folder, {WEIGHTS_FILE: TensorFile.open(folder / WEIGHTS_FILE)}, None)
        if not (folder / INDEX_FILE).is_file():
            pickles = sorted(file.name for file in folder.glob("*.bin"))
            found = f"{pickles[0]}, which is a pickle file" if pickles else "neither"
            advice = "save the base model with safetensors: save_pretrained of transformers does"
            raise ExportError(str(folder), f"{WEIGHTS_FILE} or {INDEX_FILE}", found, advice)
        index = read_json(folder / INDEX_FILE)
        places = _places(index, folder)
        files = {name: TensorFile.open(folder / name) for name in sorted(set(places.values()))}
        checkpoint = cls(folder, files, index)
        _check_places(places, checkpoint.places(), folder)
        return checkpoint

    def places(self) -> dict[str, str]:
        """Return the file name of every tensor.

        Raises:  ExportError: a tensor is in two files.
        """
        places: dict[str, str] = {}
        for name, file in self.files.items():
            for key in file.entries:
                if key in places:
                    raise ExportError(f"{key} in {self.folder}", "one tensor", f"{places[key]} and {name}")
                places[key] = name
        return places


def base_directory(base: BaseModelReference) -> Path:
    """Return the directory with a base model's files, fetched from the Hub where it is not local.

    Args:    base: as `check_base` has accepted it.
    Raises:  ExportError: the Hub does not give them.
    """
    if Path(base.name_or_path).is_dir():
        return Path(base.name_or_path)
    from huggingface_hub import snapshot_download

    wanted = [CONFIG_FILE, INDEX_FILE, "*.safetensors", *COPIED]
    if base.trust_remote_code:
        wanted.append("*.py")
    try:
        return Path(snapshot_download(base.name_or_path, revision=base.revision, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises errors of many libraries
        expected = "a base model's files from the Hub"
        raise ExportError(base.name_or_path, expected, one_sentence(error)) from error


def find_parameters(
    names: Iterable[str], keys: Collection[str], model: Any, *, fused: Collection[str] = ()
) -> dict[str, str]:
    """Return the key in the checkpoint of each of the given parameters.

    Args:    names: the names of the parameters in the model, such as "model.layers.0.mlp.up_proj.weight".
             fused: those of the names that are parts of a parameter in the model, and tensors of their own
             by these names in the checkpoint.
             keys: the keys of all tensors of the checkpoint; they are gone through twice.
             model: the model on torch's meta device.
    Raises:  ExportError: a parameter is not in the checkpoint, there twice, or not stored as the model
             uses it.
    """
    wanted = {name: name.rpartition(".")[::2] for name in names}
    found = {key: key for key in keys if key in fused}
    for key, (name, is_converted) in loaded_names(keys, model):
        if name not in wanted:
            continue
        module, kind = wanted[name]
        if is_converted:
            what = f"{key}, which transformers converts when it loads it"
            raise ExportError(module, f"a {kind} stored as the model uses it", what, "use another format")
        if name in found:
            raise ExportError(module, f"one {kind} in the checkpoint", f"{found[name]} and {key}")
        found[name] = key
    for name, (module, kind) in wanted.items():
        if name not in found:
            raise ExportError(module, f"a {kind} in the checkpoint", "none", "use another format")
    return found


def _places(index: JsonObject, folder: Path) -> dict[str, str]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(_is_file_name(name) for name in places.values()):
        found = "none, or names that are no safetensors files of this directory"
        raise ExportError(str(folder / INDEX_FILE), "a weight_map from tensors to files", found)
    return places


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _check_places(expected: Mapping[str, str], found: Mapping[str, str], folder: Path) -> None:
    for key, name in expected.items():
        if found.get(key) != name:
            where = f"it in {found[key]}" if key in found else "it in no file"
            raise ExportError(str(folder / INDEX_FILE), f"{key} in {name}", where)


def read_json(path: Path) -> JsonObject:
    """Return the JSON object in a file.

    Raises:  ExportError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(str(path), "a JSON object", f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(str(path), "a JSON object", type(content).__name__)
    return content
