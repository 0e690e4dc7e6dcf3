"""A frozen adapter with random weights and the probe of the live PEFT model that held them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from qpa.adapters.attach import adapter_parameters, attach_adapter, set_adapter
from qpa.adapters.registry import KINDS
from qpa.documents import FrozenAdapter, ParameterAccount, TrainingResult
from qpa.models.base_model import load_model
from qpa.models.probe import record_probe
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore


@dataclass(frozen=True)
class RandomAdapter:
    """A frozen adapter, the context that holds its files, and the live model it was taken from."""

    frozen: FrozenAdapter
    context: PassContext
    live: Any
    tensors: dict[str, Tensor]


def random_adapter(
    model: Path,
    store: Path,
    *,
    method: str = "lora",
    rank: int | None = 4,
    alpha: float | None = None,
    targets: tuple[str, ...] | None = None,
    scale: float = 0.3,
    seed: int = 0,
) -> RandomAdapter:
    """Attach an adapter to a model, add normal numbers times `scale` to what makes it work, and freeze it.

    Args:    rank: of kinds that have one.
             store: directory for the arrays and the probe; made when missing.
             scale: 0 gives an adapter that changes nothing.
    """
    store.mkdir(parents=True, exist_ok=True)
    context = PassContext(seed=seed, files=DirectoryStore(store))
    options = {"rank": rank if KINDS[method].has_rank else None, "alpha": alpha, "targets": targets}
    spec = InspectModel(model=str(model), method=method, **options).run(None, context)
    live = attach_adapter(load_model(spec.base, keep_dtype=False), spec)
    parameters = adapter_parameters(live, spec)
    generator = torch.Generator().manual_seed(seed)
    values = {path: tensor.detach().clone() for path, tensor in parameters.items()}
    for path in values:
        if not path.endswith((".lora_A.weight", ".ffa_down.weight")):
            values[path] += scale * torch.randn(values[path].shape, generator=generator)
    set_adapter(parameters, values)
    frozen = FrozenAdapter(
        provenance=spec.provenance.model_copy(
            update={"pass_name": "freeze-adapter", "parents": (spec.digest,)}
        ),
        base=spec.base,
        method=spec.method,
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=spec.target_modules,
        target_parameters=spec.target_parameters,
        fan_in_fan_out=spec.fan_in_fan_out,
        tensors=tuple(tensor.ref for tensor in spec.tensors),
        arrays=context.files.put("{sha256}.safetensors", save(values)),
        probe=context.files.put(
            "{sha256}.safetensors", save(record_probe(live, torch.arange(16) * 5 % 97 + 33))
        ),
        source="exact",
        shots=None,
        weight_error=0.0,
        frozen_loss=None,
        generator="spectral",
        context=None,
        account=ParameterAccount(
            n_angles=24, n_control=0, n_program=0, n_decoder=1200, n_own=0, n_adapter=spec.n_numbers
        ),
        result=TrainingResult(
            n_steps=10,
            frozen_step=10,
            objective="sft",
            scores=(),
            quantization=None,
            n_train_tokens=1000,
            n_eval_tokens=100,
            base_loss=5.5,
            eval_loss=4.25,
            data_digest="sha256:" + "0" * 64,
        ),
    )
    return RandomAdapter(frozen, context, live, values)
