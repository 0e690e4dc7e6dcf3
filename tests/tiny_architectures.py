"""More tiny random base models, of the architectures that people bring beside those of `tests.tiny_models`.

Each is as small as it can be and still have what is particular about it: attention by latent vectors,
experts, a parallel block, ALiBi, a short convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Ernie4_5Config,
    FalconConfig,
    Glm4Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from tests.tiny_models import (
    N_CONTEXT,
    SHAPE,
    SHAPE_OF_EQUAL_HEADS,
    VOCABULARY_SIZE,
    gpt_neo_config,
    special_tokens,
    write_model,
)

_GROUPED = SHAPE_OF_EQUAL_HEADS | {"num_key_value_heads": 1}
_OF_GPT = {"vocab_size": VOCABULARY_SIZE, "n_layer": 2, "n_head": 2, "initializer_range": 0.15}
_OLD = {
    name: size for name, size in SHAPE_OF_EQUAL_HEADS.items() if not name.startswith(("max_", "intermed"))
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

_CONFIGS: Mapping[str, tuple[type[PreTrainedConfig], Mapping[str, Any]]] = {
    "mixtral": (MixtralConfig, SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": (
        DeepseekV3Config,
        SHAPE_OF_EQUAL_HEADS
        | _EXPERTS
        | {"num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4}
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 512}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 64, "v_head_dim": 32}
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # vLLM asks for them
    ),
    "gpt-oss": (
        GptOssConfig,
        SHAPE
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3-next": (
        Qwen3NextConfig,
        SHAPE
        | _EXPERTS
        | {"num_experts": 4, "shared_expert_intermediate_size": 48}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "llama4": (
        Llama4TextConfig,
        SHAPE
        | {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "falcon": (FalconConfig, _OLD),
    "falcon-grouped": (FalconConfig, _OLD | {"num_kv_heads": 1, "new_decoder_architecture": True}),
    "falcon-alibi": (
        FalconConfig,
        _OLD | {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False},
    ),
    "bloom": (BloomConfig, _OF_GPT | {"hidden_size": 64}),
    "gpt-j": (GPTJConfig, _OF_GPT | {"n_embd": 64, "rotary_dim": 16, "n_positions": N_CONTEXT}),
    "cohere2": (Cohere2Config, SHAPE | {"logit_scale": 1.0}),
    "stablelm": (StableLmConfig, _GROUPED),
    "gpt-bigcode": (GPTBigCodeConfig, _OF_GPT | {"n_embd": 64, "n_positions": N_CONTEXT}),
    "granite": (GraniteConfig, _GROUPED),
    "starcoder2": (Starcoder2Config, _GROUPED),
    "smollm3": (SmolLM3Config, _GROUPED),
    "olmo2": (Olmo2Config, _GROUPED),
    "glm4": (Glm4Config, SHAPE),
    "nemotron": (NemotronConfig, SHAPE),
    "ernie4.5": (Ernie4_5Config, SHAPE),
    "lfm2": (
        Lfm2Config,
        _GROUPED
        | {"layer_types": ["conv", "full_attention"]}
        | {"conv_dim": 64, "block_dim": 64, "block_ff_dim": 96},  # vLLM asks for them
    ),
}


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the config of a 2-layer model of an architecture; GPT-Neo's has 4 layers."""
    if name == "gpt-neo":
        return gpt_neo_config()
    kind, shape = _CONFIGS[name]
    return kind(**{**shape, **special_tokens()})


def tiny(name: str, path: Path, *, seed: int = 0) -> Path:
    """Write the model of a `tiny_config`; return `path`."""
    return write_model(path, tiny_config(name), seed)


MORE_ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    name: partial(tiny, name) for name in (*_CONFIGS, "gpt-neo")
}
