"""Small layouts and trained generators of every sort that qpa.serve expands, and their compact files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from qpa.adapters.attach import initial_adapter
from qpa.documents import WeightLayout
from qpa.generators.canonical import trained_numbers
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.generators.generator import make_generator
from qpa.passes.plan_layout import PlanLayout
from qpa.serve.basis import Basis
from tests.small_specs import NOWHERE, small_spec

RANK = 4
SPEC = small_spec(3, RANK)
PLANS = {
    "state": PlanLayout(generator="state", layers=2),
    "several": PlanLayout(generator="state", layers=1, circuits=3),
    "signed": PlanLayout(generator="state", layers=2, features="signed"),
    "vectors": PlanLayout(generator="state", layers=1, features="signed", vectors=("v_proj", "down_proj")),
    "spectral": PlanLayout(generator="spectral", circuits=3),
    "half": PlanLayout(generator="spectral", circuits=1, vectors=("k_proj",)),
    "constant": PlanLayout(generator="state", features="constant"),
    "log-linear": PlanLayout(generator="state", features="log-linear", control_size=20),
    "tables": PlanLayout(generator="state", features="tables", control_size=40),
    "own": PlanLayout(generator="state", features="own", control_size=30),
}


def trained(name, scale=0.7):
    """Return a layout and a generator whose numbers and bases are drawn."""
    layout: WeightLayout = PLANS[name].run(SPEC, NOWHERE)
    random = torch.Generator().manual_seed(7)
    bases = {path: torch.randn(shape, generator=random) for path, shape in basis_shapes(layout).items()}
    generator = make_generator(layout, 0, bases)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=random)
    return layout, generator


def initial(layout):
    """Return the adapter before training, by path."""
    return initial_adapter(SPEC, kept_rows(layout))


def in_torch(layout, generator):
    """Return the adapter as training has it, by path."""
    values = initial(layout)
    with torch.no_grad():
        for tensor, generated in zip(layout.tensors, generator(), strict=True):
            values[tensor.path] = values[tensor.path] + generated
    return values


def write_basis(directory: Path, name="state", spec=SPEC):
    """Write a basis of drawn directions, with all of them for every tensor; return it opened."""
    from safetensors.torch import save

    random = torch.Generator().manual_seed(11)
    first = initial_adapter(spec)
    arrays = {tensor.path: torch.randn(tensor.shape, generator=random) for tensor in spec.tensors}
    arrays |= {f"initial.{a.path}": first[a.path] for a, _ in spec.pairs}
    content = save(arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    document = {
        "schema": "qpa.basis/2",
        "banks": [{"name": "drawn"}],
        "base": {"name_or_path": "model"},
        "scale": spec.alpha / spec.rank,
        "lora_config": json.dumps({"r": spec.rank, "peft_type": "LORA"}) + "\n",
        "tensors": [
            {
                "path": tensor.path,
                "key": f"base_model.model.{tensor.path}",
                "factor": "A" if tensor.role == "lora_A" else "B",
                "shape": list(tensor.shape),
            }
            for tensor in spec.tensors
        ],
        "arrays": {"file": f"{sha256}.safetensors", "sha256": sha256, "n_bytes": len(content)},
    }
    directory.mkdir(parents=True)
    (directory / f"{sha256}.safetensors").write_bytes(content)
    (directory / "basis.json").write_text(json.dumps(document))
    return Basis.open(directory)


def write_compact(path: Path, basis: Basis, name="state", numbers="float32"):
    """Write a compact file of drawn numbers, and its layout; return the layout and the generator."""
    layout, generator = trained(name)
    kept = trained_numbers(layout, generator.state_dict())
    content = kept.compact(basis.digest.hex()).as_bytes(numbers)
    (path.parent / "layouts").mkdir(parents=True, exist_ok=True)
    (path.parent / "layouts" / f"{kept.layout.digest.hex()}.json").write_bytes(kept.text)
    path.write_bytes(content)
    return layout, generator
