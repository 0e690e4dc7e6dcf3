"""Adapter specs of small imaginary models, made without any model."""

from __future__ import annotations

from pathlib import Path

from qpa.documents import AdapterSpec, AdapterTensor, BaseModelReference, Provenance
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))

SIDES = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (8, 6),
    "self_attn.v_proj": (8, 6),
    "mlp.up_proj": (8, 10),
    "mlp.down_proj": (10, 8),
}
"""in_features and out_features by the name of a module in its layer."""


def small_spec(
    n_layers: int, rank: int, sides: dict[str, tuple[int, int]] | None = None, seed: int = 0
) -> AdapterSpec:
    """Return the spec of a model whose layers all have these modules."""
    sides = SIDES if sides is None else sides
    modules = [(f"layers.{layer}.{name}", *sides[name]) for layer in range(n_layers) for name in sides]
    return spec_of(modules, rank, seed)


def spec_of(modules: list[tuple[str, int, int]], rank: int, seed: int = 0) -> AdapterSpec:
    """Return the spec of modules given as (path, in_features, out_features)."""
    return AdapterSpec(
        provenance=Provenance(pass_name="test", options=(), seed=seed, qpa_version="0", parents=()),
        parent=None,
        basis=None,
        base=BaseModelReference(
            name_or_path="model",
            revision=None,
            config_digest="",
            model_type="",
            architecture="",
            ties_lm_head=False,
            trust_remote_code=False,
        ),
        method="lora",
        rank=rank,
        alpha=2.0 * rank,
        target_modules=tuple(path for path, _, _ in modules),
        target_parameters=(),
        left_out=(),
        fan_in_fan_out=False,
        tensors=tuple(tensor for module in modules for tensor in tensor_pair(*module, rank)),
        seed=seed,
    )


def tensor_pair(module: str, n_in: int, n_out: int, rank: int) -> tuple[AdapterTensor, AdapterTensor]:
    """Return lora_A and lora_B of a module."""
    kind = module.rpartition(".")[2]
    return (
        AdapterTensor(
            module=module, module_type=kind, role="lora_A", shape=(rank, n_in), initial="kaiming_uniform"
        ),
        AdapterTensor(module=module, module_type=kind, role="lora_B", shape=(n_out, rank), initial="zeros"),
    )
