"""Compact adapters of random numbers, with a basis of random directions, for any shapes of layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from qpa.serve.basis import Basis
from qpa.serve.compact import Compact, Numbers
from qpa.serve.decoding import lengths
from qpa.serve.layout import SCHEMA, Layout

LLAMA = {
    **{f"self_attn.{name}_proj": (n_out, 64) for name, n_out in {"q": 64, "k": 32, "v": 32}.items()},
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
"""Rows and columns of the linear layers of a layer of the tests' tiny Llama."""


def layers(of_one: Mapping[str, tuple[int, int]], n_layers: int) -> dict[str, tuple[int, int]]:
    """Return rows and columns of all linear layers by their names in transformers."""
    return {
        f"model.layers.{number}.{name}": shape for number in range(n_layers) for name, shape in of_one.items()
    }


def write_basis(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    base: str = "tiny",
    seed: int = 0,
) -> Basis:
    """Write a basis of random directions, and open it.

    Args:    shapes: rows and columns of every linear layer by its name.
    """
    rng = np.random.default_rng(seed)
    arrays, tensors = {}, []
    for name, (n_rows, n_columns) in shapes.items():
        for factor, shape in {"A": (rank, n_columns), "B": (n_rows, rank)}.items():
            path = f"{name}.lora_{factor}.weight"
            arrays[path] = rng.standard_normal(shape).astype(np.float32) / np.float32(max(shape) ** 0.5)
            key = f"base_model.model.{path}"
            tensors.append({"path": path, "key": key, "factor": factor, "shape": list(shape)})
            if factor == "A":
                arrays[f"initial.{path}"] = np.zeros(shape, np.float32)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    directory.mkdir(parents=True)
    content = save(arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    (directory / f"{sha256}.safetensors").write_bytes(content)
    document = {
        "schema": "qpa.basis/2",
        "banks": [{"name": "drawn"}],
        "base": {"name_or_path": base},
        "lora_config": json.dumps(config, indent=2, sort_keys=True),
        "scale": 1.0,
        "tensors": tensors,
        "arrays": {"file": f"{sha256}.safetensors", "sha256": sha256},
    }
    (directory / "basis.json").write_text(json.dumps(document))
    return Basis.open(directory)


def write_layout(store: Path, basis: Basis, *, n_circuits: int = 2) -> Layout:
    """Write a layout into a store: every direction of every layer gets a factor from circuits."""
    modules = sorted(path.removesuffix(".lora_B.weight") for path in basis.shapes if ".lora_B." in path)
    rank = basis.config["r"]
    n_qubits = max(2, int(np.ceil(np.log2(len(modules)))))
    tensors: list[dict[str, Any]] = []
    for number, name in enumerate(modules):
        tensors.append({"path": f"{name}.lora_A.weight", "chunks": []})
        tensors.append({"path": f"{name}.lora_B.weight", "chunks": [number]})
    group = {
        "name": "all",
        "axis": "spectrum",
        "chunk_size": rank,
        "states": list(range(len(modules))),
        "decoder": {"kind": "linear", "widths": [n_circuits, rank], "has_bias": False},
        "tensors": tensors,
    }
    document = {
        "schema": SCHEMA,
        "features": {
            "kind": "circuit",
            "n_circuits": n_circuits,
            "has_index_bits": False,
            "contexts": None,
            "windows": None,
            "registers": [],
            "n_control": 0,
        },
        "ansatz": {"kind": "ry-cnot-chain", "n_qubits": n_qubits, "n_layers": 2},
        "groups": [group],
    }
    content = json.dumps(document, sort_keys=True).encode()
    layout = Layout.parse("layout", content)
    folder = store / "layouts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{layout.digest.hex()}.json").write_bytes(content)
    return layout


def write_adapters(
    store: Path,
    names: Sequence[str],
    basis: Basis,
    layout: Layout,
    *,
    numbers: Numbers = "int16",
    scale: float = 1.0,
    seed: int = 0,
) -> list[Path]:
    """Write an adapter of random numbers under each name, in the banks of the basis by turns.

    Args:    scale: of the decoders' weights.
    """
    paths = []
    for number, name in enumerate(names):
        rng = np.random.default_rng((seed, number))
        angles, *weights = (
            rng.standard_normal(n).astype(np.float32) for n in lengths(layout, are_probabilities=False)
        )
        arrays = (angles, *(one * np.float32(scale) for one in weights))
        compact = Compact(basis.digest, layout.digest, False, arrays, number % len(basis.banks))
        (store / name).write_bytes(compact.as_bytes(numbers))
        paths.append(store / name)
    return paths
