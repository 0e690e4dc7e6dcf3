"""Whether a model is causal: no answer at a position depends on a later token.

A causal language model's losses mean something only then. An encoder that transformers also offers as one,
such as BERT, sees every token that it is to predict: its loss falls, and what it has learnt is worthless.
In a causal model

    d ||logits[:n/2]||^2 / d embedding[n/2:]  =  0

exactly and in every dtype, since the weight of a masked token is an exact zero. The derivative is asked for,
and not a second answer to a changed text: in a mixture of experts, other tokens change which rows are
multiplied together, so how their products are rounded, and even which tokens find room.

Source:  ours.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

from qpa.compat.logging_ import without_logs
from qpa.errors import ModelError

N_TOKENS = 16

LARGEST_LEAK = 1e-4
"""The largest derivative by a later embedding over that by an earlier one; an untrained BERT's is 5e-3."""

MOST_PARAMETERS = 40_000_000
"""The most parameters of a layer that is drawn when planning, in half a second; BERT-large has fewer."""


def check_causal(model: Any, name: str, *, bf16: bool = False) -> None:
    """Check that a base model with its weights is causal, by one pass over 16 tokens and back.

    Args:    model: of transformers, without an adapter, on any device; it is left as it was.
             name: the model's name, for the message.
             bf16: run the model under bfloat16 autocast.
    Raises:  ModelError: an answer depends on later tokens.
    """
    if _leak(model, bf16=bf16) > LARGEST_LEAK:
        raise ModelError(
            name,
            "a causal language model, whose answers depend on earlier tokens only",
            f"{type(model).__name__}, whose answers depend on later tokens too",
            "use a decoder, or, if the weights are those of one, set is_decoder in config.json",
        )


def check_causal_config(config: Any, name: str, *, trust_remote_code: bool = False) -> None:
    """Check that a config's first layer is causal, with weights drawn at random, where that is cheap.

    A large layer, or a config that has no such small model, is left to `check_causal` before training.

    Raises:  ModelError: an answer depends on later tokens.
    """
    # What transformers says about the cut config does not help the user.
    with without_logs(logging.WARNING), warnings.catch_warnings(action="ignore"):
        try:
            model = _first_layer(config, trust_remote_code=trust_remote_code)
            if model is not None:
                check_causal(model, name)
        except ModelError:
            raise
        except Exception:  # whatever a config cut short may break says nothing of the whole one
            return


def _leak(model: Any, *, bf16: bool) -> float:
    """Return the largest derivative of earlier answers in a later embedding, over that in an earlier one."""
    import torch

    embedding = model.get_input_embeddings()
    n_tokens = _n_tokens(model.config.get_text_config())
    half = n_tokens // 2
    leaves: list[Any] = []

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()  # some models scale their embeddings in place

    n_known, device = embedding.weight.shape[0], embedding.weight.device
    # Special tokens, and those that stand for images, are at either end of a vocabulary.
    ids = (torch.arange(n_tokens, device=device)[None] + n_known // 2) % n_known
    was_training, hook = model.training, embedding.register_forward_hook(replace)
    try:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model.eval()(input_ids=ids, use_cache=False).logits
            earlier = logits[:, :half].float().square().sum()
            (gradient,) = torch.autograd.grad(earlier, leaves[0])
    finally:
        hook.remove()
        model.train(was_training)
    by_position = gradient.float().reshape(n_tokens, -1).norm(dim=1)
    return float(by_position[half:].max() / by_position[:half].max()) if half else 0.0


def _n_tokens(config: Any) -> int:
    """Return how many tokens to ask about: as many as fit the context, where there is one."""
    limit = getattr(config, "max_position_embeddings", None)
    return min(N_TOKENS, limit) if isinstance(limit, int) and limit > 0 else N_TOKENS


def _first_layer(config: Any, *, trust_remote_code: bool) -> Any:
    """Return a config's model of one layer and a small vocabulary, in eval mode; None where it is large."""
    import torch
    from transformers import AutoModelForCausalLM

    cut = _cut_config(config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(cut, trust_remote_code=trust_remote_code)
    if sum(parameter.numel() for parameter in empty.parameters()) > MOST_PARAMETERS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            cut, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    return model.eval()


def _cut_config(config: Any) -> Any:
    """Return a config with one layer and 64 tokens; its lists with an entry per layer keep one entry."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    n_layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == n_layers:
            setattr(text, name, value[:1])
    text.num_hidden_layers = 1
    text.vocab_size = 4 * N_TOKENS
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return cut
