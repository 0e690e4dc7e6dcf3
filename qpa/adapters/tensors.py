"""The tensors of each kind of adapter, for modules that are known.

Rules:
1. LoRA (arXiv 2106.09685): W + (alpha / rank) B A. lora_A [rank, in], lora_B [out, rank], whatever way the
   base stores its weight; of an embedding lora_embedding_A [rank, n_vocabulary] and lora_embedding_B.
2. DoRA (arXiv 2402.09353): each row of that sum is brought to a length, lora_magnitude_vector [out, 1], which
   starts as the row's length in the base.
3. IA3 (arXiv 2205.05638): ia3_l scales what a module returns, [out, 1], or, of the second layer of a
   feed-forward block, what it gets, [1, in].
4. Prefix tuning (arXiv 2101.00190): keys and values that every layer's attention finds before the text's own.
5. Feed-forward adapter (arXiv 1902.00751): h + up(gelu(down(h))) behind a block that returns h; without
   biases. The QPA paper names it and does not give its form.

Source: the papers; shapes and names as in PEFT, of the feed-forward adapter ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qpa.documents import EMBEDDING_ROLES, ROLES_OF, AdapterTensor, Method
from qpa.documents.adapter_spec import InitialValue, Role

Sides = Mapping[str, tuple[int, int]]
"""in_features and out_features by module path."""

FEED_FORWARD_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "w2", "fc_out")
"""The second layers of feed-forward blocks, of which IA3 scales the input."""

IA3_TARGETS = (
    *("k_proj", "v_proj", "key", "value", "c_attn", "query_key_value", "qkv_proj"),
    *FEED_FORWARD_OUTPUTS,
)
"""What IA3 adapts where nothing else is asked for: keys and values, fused or not, and feed-forward blocks."""

FEED_FORWARD_BLOCKS = ("mlp", "feed_forward", "ffn", "fc2")
"""What a feed-forward adapter comes behind; the first of these names that a model has."""

_INITIAL: dict[Role, InitialValue] = {
    "lora_A": "kaiming_uniform",
    "lora_embedding_A": "uniform",
    "lora_magnitude_vector": "base",
    "ia3_l": "ones",
    "prefix_key": "base",
    "prefix_value": "base",
    "ffa_down": "kaiming_uniform",
}


def module_tensors(
    method: Method, sides: Sides, rank: int, embeddings: Collection[str] = ()
) -> tuple[AdapterTensor, ...]:
    """Return the tensors of an adapter on some modules, in the modules' order.

    Args:    embeddings: those of the modules that are embeddings.
    """
    return tuple(
        AdapterTensor(
            module=path,
            module_type=path.rpartition(".")[2],
            role=role,
            shape=_shape(role, path, n_in, n_out, rank),
            initial=_INITIAL.get(role, "zeros"),
        )
        for path, (n_in, n_out) in sides.items()
        for role in (EMBEDDING_ROLES if path in embeddings else ROLES_OF[method])
    )


def prefix_tensors(n_layers: int, width: int, n_tokens: int) -> tuple[AdapterTensor, ...]:
    """Return keys and values, [n_tokens, width] each, of every layer's prefix."""
    return tuple(
        AdapterTensor(
            module=f"layers.{layer}",
            module_type="layers",
            role=role,
            shape=(n_tokens, width),
            initial=_INITIAL[role],
        )
        for layer in range(n_layers)
        for role in ROLES_OF["prefix"]
    )


def scales_inputs(path: str) -> bool:
    """Return whether IA3 scales what a module gets, rather than what it returns."""
    return any(f".{path}".endswith(f".{name}") for name in FEED_FORWARD_OUTPUTS)


def _shape(role: Role, path: str, n_in: int, n_out: int, rank: int) -> tuple[int, int]:
    if role in ("lora_A", "lora_embedding_A", "ffa_down"):
        return (rank, n_in)
    if role in ("lora_B", "lora_embedding_B", "ffa_up"):
        return (n_out, rank)
    return (1, n_in) if role == "ia3_l" and scales_inputs(path) else (n_out, 1)
