"""Build the demonstration's base model: a small Llama that has read a lighthouse keeper's diary.

Everything is made here, from seeds: the text (`demo.texts`), the tokenizer (byte-level BPE) and the weights.
No weights are shipped and nothing is downloaded. Two builds on one machine give the same bytes.

    python -m demo.build_model runs/demo-base
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from demo.texts import diary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

N_STEPS = 400
N_LINES = 3000
N_TOKENS = 48
"""Tokens per training row."""
BATCH_SIZE = 16
PEAK_LR = 6e-3
END_OF_TEXT = "<end>"


def build_model(directory: Path, *, n_steps: int = N_STEPS, seed: int = 0) -> float:
    """Write a Hugging Face directory: model.safetensors, config and tokenizer.

    Args:    directory: made if missing; files of an earlier build in it are replaced.
             n_steps: optimizer steps of training on the diary.
             seed: of text, initial weights and order of rows.
    Returns: the last step's loss, nats per token.
    """
    tokenizer = train_tokenizer(diary(seed, N_LINES))
    tokens = torch.tensor(tokenizer(diary(seed, N_LINES), verbose=False)["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(len(tokenizer))
        loss = train(model, tokens, n_steps)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return loss


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most 512 entries, trained on a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def new_model(n_vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained Llama of about 0.17 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=n_vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokens: Tensor, n_steps: int) -> float:
    """Train on rows cut from int64[n] tokens at random places; return the last loss, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=n_steps + 1, pct_start=0.1)
    window = torch.arange(N_TOKENS)
    model.train()
    for _ in range(n_steps):
        starts = torch.randint(len(tokens) - N_TOKENS, (BATCH_SIZE, 1))
        rows = tokens[starts + window]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return float(loss.item())


def main() -> None:
    """Build the model in the directory named on the command line."""
    parser = argparse.ArgumentParser(description="Build the demonstration's base model.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    options, started_s = parser.parse_args(), time.monotonic()
    # One thread: sums are then added in one order, whatever the number of cores, and so small a model gains
    # nothing from more.
    torch.set_num_threads(1)
    loss = build_model(options.directory, n_steps=options.steps)
    duration_s = time.monotonic() - started_s
    print(f"wrote {options.directory}: {options.steps} steps, last loss {loss:.3f}, {duration_s:.0f} s")


if __name__ == "__main__":
    main()
