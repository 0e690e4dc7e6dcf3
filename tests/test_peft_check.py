"""PEFT is asked about an adapter before there are weights, of layers that are alike about one."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconH1Config, LlamaConfig, MambaConfig

from qpa.adapters import peft_check
from qpa.adapters.peft_check import check_in_peft
from qpa.errors import ModelError
from qpa.models.base_model import build_on_meta
from tests.test_inspect_model import GATED, inspect
from tests.test_train_generator import plan, train
from tests.tiny_models import tiny_mamba

LLAMA = LlamaConfig(**GATED | {"num_hidden_layers": 6}, tie_word_embeddings=False)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("config", "others"),
    [
        (
            MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
            "in_proj,x_proj,dt_proj",
        ),
        (
            FalconH1Config(**GATED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=4),
            "gate_proj,up_proj,down_proj,in_proj,q_proj,k_proj,v_proj,o_proj",
        ),
    ],
    ids=["mamba", "falcon-h1"],
)
def test_a_module_that_peft_refuses_is_refused_by_the_plan(tmp_path, method, config, others):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        inspect(tmp_path, method=method, rank=2)
    assert caught.value.expected.startswith("a model for which PEFT supports ")
    assert "Module 'out_proj' is incompatible with Mamba-based models" in caught.value.found
    assert caught.value.advice == f"name the others: `targets` {others}"
    spec = inspect(tmp_path, method=method, rank=2, targets=tuple(others.split(",")))
    assert spec.target_modules == tuple(others.split(","))


def test_what_the_plan_advises_trains(tmp_path, text_file):
    model = tiny_mamba(tmp_path / "mamba")
    with pytest.raises(ModelError, match="incompatible with Mamba") as caught:
        plan(model, tmp_path / "refused")
    others = caught.value.advice.rpartition(" `targets` ")[2].split(",")
    run = plan(model, tmp_path / "run", inspect={"targets": tuple(others)})
    assert train(run, text_file, max_steps=1).result.n_steps == 1


@pytest.mark.parametrize(
    "targets",
    [("all-linear",), ("q_proj", "lm_head"), ("model.layers.3.mlp.up_proj", "4.self_attn.q_proj")],
    ids=str,
)
def test_layers_that_are_alike_are_asked_about_once(tmp_path, targets):
    LLAMA.save_pretrained(tmp_path)
    spec = inspect(tmp_path, targets=targets)
    model = build_on_meta(LLAMA, "it")
    check_in_peft(model, spec)
    identities = [isinstance(layer, torch.nn.Identity) for layer in model.model.layers]
    is_first = (
        [False, True, True, False, False, True] if len(targets) > 1 and "lm_head" not in targets else None
    )
    assert identities == (is_first or [False] + [True] * 5)


def test_a_tensor_that_peft_does_not_make_is_found_in_any_layer(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    spec = inspect(tmp_path)
    wrong = tuple(
        tensor.model_copy(update={"shape": (9, 9)})
        if ".5." in tensor.path and tensor.role == "lora_A"
        else tensor
        for tensor in spec.tensors
    )
    model = build_on_meta(LLAMA, "it")
    model.model.layers[5].mlp.up_proj = torch.nn.Linear(32, 40, bias=False, device="meta")
    with pytest.raises(ModelError, match=r"layers\.5\..*lora_A"):
        check_in_peft(model, spec.model_copy(update={"tensors": wrong}))


def test_asking_about_many_layers_costs_little_more_than_about_one(tmp_path, monkeypatch):
    wrapped = []
    wrap = peft_check._wrap
    monkeypatch.setattr(
        peft_check, "_wrap", lambda model, spec: wrapped.append(len(spec.tensors)) or wrap(model, spec)
    )
    LlamaConfig(**GATED | {"num_hidden_layers": 80}).save_pretrained(tmp_path)
    spec = inspect(tmp_path)
    assert len(spec.tensors) == 80 * 14
    check_in_peft(build_on_meta(LlamaConfig(**GATED | {"num_hidden_layers": 80}), "it"), spec)
    assert wrapped == [14]
