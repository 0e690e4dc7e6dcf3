"""Tiny random base models with a tokenizer, built from configs: the same bytes for the same seed.

Head size 32 is the smallest that vLLM's CPU attention takes. The weights are larger than transformers'
default, so that attention and feed-forward layers matter beside the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 272
N_CONTEXT = 512

SHAPE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": N_CONTEXT,
    "initializer_range": 0.15,
}
SHAPE_OF_EQUAL_HEADS = {
    name: size for name, size in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")
}
"""For architectures without heads of their own for keys and values: 64 / 2 is the head size again."""


def tiny_llama(path: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write a 2-layer Llama, with its head tied to the embedding or not; return `path`."""
    return write_model(path, LlamaConfig(**SHAPE, **special_tokens(), tie_word_embeddings=tied), seed)


def tiny_qwen2(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Qwen2, whose attention has biases, with an untied head; return `path`.

    Its rotary base is that of Qwen2's own models, which some engines take without asking the config.
    """
    rope = {"rope_type": "default", "rope_theta": 1e6}
    shape = SHAPE | {"tie_word_embeddings": False, "rope_parameters": rope}
    return write_model(path, Qwen2Config(**shape, **special_tokens()), seed)


def tiny_qwen3(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Qwen3 with an untied head; return `path`."""
    return write_model(path, Qwen3Config(**SHAPE, **special_tokens(), tie_word_embeddings=False), seed)


def tiny_qwen3_moe(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Qwen3-MoE of 4 experts, 2 for each token, with an untied head; return `path`."""
    config = Qwen3MoeConfig(
        **SHAPE,
        **special_tokens(),
        moe_intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    return write_model(path, config, seed)


def tiny_mistral(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Mistral with an untied head; return `path`."""
    config = MistralConfig(**SHAPE, **special_tokens(), sliding_window=None, tie_word_embeddings=False)
    return write_model(path, config, seed)


def tiny_phi3(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Phi3, with fused qkv_proj and gate_up_proj, with an untied head; return `path`."""
    config = Phi3Config(
        **SHAPE,
        **special_tokens(),
        original_max_position_embeddings=N_CONTEXT,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    return write_model(path, config, seed)


def tiny_gemma2(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Gemma2 with a tied head; return `path`.

    Gemma multiplies its embedding by sqrt(hidden_size); left as large, it would only repeat its input.
    """
    config = Gemma2Config(**SHAPE, **special_tokens(), query_pre_attn_scalar=32, sliding_window=N_CONTEXT)
    return write_model(path, config, seed, embedding_scale=0.1)


def tiny_gemma3(path: Path, *, seed: int = 0) -> Path:
    """Write a 6-layer text-only Gemma3 with a tied head; return `path`. See `tiny_gemma2`.

    The sixth layer is the first without a sliding window, which some engines take for granted.
    """
    shape = SHAPE | {"num_hidden_layers": 6}
    config = Gemma3TextConfig(**shape, **special_tokens(), query_pre_attn_scalar=32, sliding_window=N_CONTEXT)
    return write_model(path, config, seed, embedding_scale=0.1)


def tiny_gemma3_vision(path: Path, *, seed: int = 0) -> Path:
    """Write a Gemma3 that also takes images: `tiny_gemma3` beside a 1-layer image encoder; return `path`."""
    text = Gemma3TextConfig(**SHAPE, **special_tokens(), query_pre_attn_scalar=32, sliding_window=N_CONTEXT)
    image_size, patch_size = 28, 14
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=(image_size // patch_size) ** 2,
        boi_token_index=268,
        eoi_token_index=269,
        image_token_index=270,
    )
    return write_model(path, config, seed, embedding_scale=0.1)


def tiny_opt(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer OPT, whose layers have biases, with a tied head; return `path`."""
    config = OPTConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=N_CONTEXT,
        init_std=SHAPE["initializer_range"],
        **special_tokens(),
    )
    return write_model(path, config, seed)


def tiny_gpt_neox(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer GPT-NeoX, with fused query_key_value, with an untied head; return `path`."""
    config = GPTNeoXConfig(
        **SHAPE_OF_EQUAL_HEADS,
        tie_word_embeddings=False,
        **special_tokens(),
    )
    return write_model(path, config, seed)


def tiny_bert(path: Path, *, is_decoder: bool = False, seed: int = 0) -> Path:
    """Write a 2-layer BERT, which sees in both directions unless it is a decoder; return `path`."""
    config = BertConfig(
        **SHAPE_OF_EQUAL_HEADS,
        is_decoder=is_decoder,
        **special_tokens(),
    )
    return write_model(path, config, seed)


def tiny_gpt_neo(path: Path, *, seed: int = 0) -> Path:
    """Write a 4-layer GPT-Neo, with windows of 6 tokens in every second, with a tied head; return `path`."""
    return write_model(path, gpt_neo_config(), seed)


def gpt_neo_config() -> PreTrainedConfig:
    """Return the config of `tiny_gpt_neo`."""
    return GPTNeoConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_heads=2,
        attention_types=[[["global", "local"], 2]],
        window_size=6,
        max_position_embeddings=N_CONTEXT,
        initializer_range=SHAPE["initializer_range"],
        **special_tokens(),
    )


def tiny_mamba(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Mamba, which has no attention, with a tied head; return `path`."""
    config = MambaConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=64, num_hidden_layers=2, state_size=4, **special_tokens()
    )
    return write_model(path, config, seed)


def tiny_gpt2(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer GPT-2, made of Conv1D layers, with a tied head; return `path`."""
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=N_CONTEXT,
        initializer_range=SHAPE["initializer_range"],
        **special_tokens(),
    )
    return write_model(path, config, seed)


ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "llama-tied": partial(tiny_llama, tied=True),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "phi3": tiny_phi3,
    "mistral": tiny_mistral,
    "opt": tiny_opt,
    "gpt-neox": tiny_gpt_neox,
    "gpt2": tiny_gpt2,
    "qwen3-moe": tiny_qwen3_moe,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte and an end-of-text token, which also pads."""
    vocabulary = {END_OF_TEXT: 0}
    vocabulary |= {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=N_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def special_tokens() -> dict[str, int | None]:
    """Return the tokens of `byte_tokenizer` as a config names them."""
    return {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def write_model(path: Path, config: PreTrainedConfig, seed: int, embedding_scale: float = 1.0) -> Path:
    """Write a model of random weights and its tokenizer; return `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.get_input_embeddings().weight.data.mul_(embedding_scale)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
