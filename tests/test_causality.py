"""Encoders are refused as causal language models, by what they compute, with and without their weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    ElectraConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    RobertaConfig,
    XLNetConfig,
)

from qpa.bench.task import Setting, load_task
from qpa.errors import ModelError
from qpa.models import causality
from qpa.models.causality import check_causal, check_causal_config
from tests.test_train_generator import plan, train
from tests.tiny_models import ARCHITECTURES, tiny_bert

BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
ENCODERS = {
    "bert": BertConfig(**BERT),
    "roberta": RobertaConfig(**BERT, pad_token_id=0),
    "electra": ElectraConfig(**BERT, embedding_size=16),
    "xlnet": XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=48),
}
DECODERS = {
    "bert": BertConfig(**BERT, is_decoder=True),
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mixtral": MixtralConfig(
        **BERT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1, initializer_range=0.5
    ),
    "short": LlamaConfig(**BERT, num_key_value_heads=2, max_position_embeddings=3),
    "one-token": LlamaConfig(**BERT, num_key_value_heads=2, max_position_embeddings=1),
}
REFUSED = (
    r"^it: expected a causal language model, whose answers .* found \w+, whose answers .*; use a decoder"
)


def drawn(config, dtype=torch.float32):
    with warnings.catch_warnings(action="ignore"):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_refused(name, dtype):
    """Even before training, with dropout on, and in bfloat16."""
    model = drawn(ENCODERS[name], dtype).train()
    with pytest.raises(ModelError, match=REFUSED):
        check_causal(model, "it", bf16=dtype is torch.bfloat16)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_not_refused(name, dtype):
    model = drawn(DECODERS[name], dtype).train()
    check_causal(model, "it", bf16=dtype is torch.bfloat16)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_the_smallest_look_ahead_is_found_and_a_frozen_model_stays_frozen():
    model = drawn(DECODERS["short"]).requires_grad_(False)
    check_causal(model, "it")
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda module, inputs, output: output + 1e-3 * output.roll(-1, dims=1))
    with pytest.raises(ModelError, match=REFUSED):
        check_causal(model, "it")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_places_taken_by_other_tokens_do_not_count():
    """An expert with room for so many tokens passes over some for the sake of others."""
    model = drawn(DECODERS["short"])

    def keep_largest(module, inputs, output):
        chosen = output.norm(dim=-1, keepdim=True)
        return output * (chosen >= chosen.median())

    model.model.layers[0].mlp.register_forward_hook(keep_largest)
    check_causal(model, "it")


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_by_its_config(name):
    before = torch.get_rng_state()
    with pytest.raises(ModelError, match=REFUSED):
        check_causal_config(ENCODERS[name], "it")
    assert torch.equal(torch.get_rng_state(), before)
    assert ENCODERS[name].num_hidden_layers == 2 and ENCODERS[name].vocab_size == 64


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_not_refused_by_its_config(name):
    check_causal_config(DECODERS[name], "it")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_of_decoders_is_refused(name, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ARCHITECTURES[name](tmp_path))
    assert causality._leak(model, bf16=False) == 0.0
    check_causal_config(model.config, "it")


def test_a_large_layer_is_not_drawn(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights of a large layer were drawn")

    config = BertConfig(hidden_size=4096, intermediate_size=16384, num_attention_heads=32)
    monkeypatch.setattr(torch, "manual_seed", fail)
    check_causal_config(config, "it")


# Where it is asked


def test_a_plan_for_an_encoder_is_refused(tmp_path):
    model = tiny_bert(tmp_path / "bert")
    with pytest.raises(ModelError, match="expected a causal language model"):
        plan(model, tmp_path / "run")
    plan(tiny_bert(tmp_path / "decoder", is_decoder=True), tmp_path / "decoder-run")


def test_training_refuses_an_encoder_that_the_plan_could_not_tell(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(causality, "MOST_PARAMETERS", 0)
    run = plan(tiny_bert(tmp_path / "bert"), tmp_path / "run")
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(ModelError, match="found BertLMHeadModel, whose answers depend on later tokens too"):
        train(run, text_file)
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_the_bench_refuses_an_encoder(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(causality, "MOST_PARAMETERS", 0)
    task = load_task(Setting(str(tiny_bert(tmp_path / "bert")), text_file, max_length=32))
    with pytest.raises(ModelError, match="found BertLMHeadModel, whose answers depend on later tokens too"):
        task.base.load()
