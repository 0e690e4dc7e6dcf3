"""Tiny random base models with a tokenizer, built from configs: the same bytes for the same seed.

Head size 32 is the smallest that vLLM's CPU attention takes. The weights are larger than transformers'
default, so that attention and feed-forward layers matter beside the residual stream.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 272
N_CONTEXT = 512

_SHAPE = {
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


def tiny_llama(path: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write a 2-layer Llama, with its head tied to the embedding or not; return `path`."""
    return _write(path, LlamaConfig(**_SHAPE, **_special_tokens(), tie_word_embeddings=tied), seed)


def tiny_qwen3(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Qwen3 with an untied head; return `path`."""
    return _write(path, Qwen3Config(**_SHAPE, **_special_tokens(), tie_word_embeddings=False), seed)


def tiny_gemma2(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer Gemma2 with a tied head; return `path`.

    Gemma multiplies its embedding by sqrt(hidden_size); left as large, it would only repeat its input.
    """
    config = Gemma2Config(**_SHAPE, **_special_tokens(), query_pre_attn_scalar=32, sliding_window=N_CONTEXT)
    return _write(path, config, seed, embedding_scale=0.1)


def tiny_gpt2(path: Path, *, seed: int = 0) -> Path:
    """Write a 2-layer GPT-2, made of Conv1D layers, with a tied head; return `path`."""
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=N_CONTEXT,
        initializer_range=_SHAPE["initializer_range"],
        **_special_tokens(),
    )
    return _write(path, config, seed)


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


def _special_tokens() -> dict[str, int | None]:
    return {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def _write(path: Path, config: PreTrainedConfig, seed: int, embedding_scale: float = 1.0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.get_input_embeddings().weight.data.mul_(embedding_scale)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
