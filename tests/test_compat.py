"""Every name of another library that is private or not documented is still there, and means what it meant."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

from qpa.compat import peft_, transformers_
from qpa.compat.logging_ import without_logs
from qpa.compat.torch_ import add_each, allocations, copy_each, norm_of_each
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_qwen3_moe

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def trained_names(wrapped: Any) -> set[str]:
    return {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}


# PEFT


def test_the_names_of_a_wrapped_models_parameters(llama: Path) -> None:
    config = LoraConfig(r=2, target_modules=["model.layers.0.self_attn.q_proj", "embed_tokens"])
    wrapped = get_peft_model(load(llama), config)
    assert wrapped.active_adapter == peft_.ADAPTER_NAME
    assert trained_names(wrapped) == {
        peft_.module_parameter("model.layers.0.self_attn.q_proj", "lora_A"),
        peft_.module_parameter("model.layers.0.self_attn.q_proj", "lora_B"),
        peft_.module_parameter("model.embed_tokens", "lora_embedding_A", is_module=False),
        peft_.module_parameter("model.embed_tokens", "lora_embedding_B", is_module=False),
    }
    keys = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert all(key.startswith(peft_.KEY_PREFIX) for key in keys)
    adapted = wrapped.get_base_model().model.layers[0].self_attn
    assert peft_.is_adapted(adapted.q_proj) and not peft_.is_adapted(adapted.k_proj)


def test_the_files_of_a_directory(llama: Path, tmp_path: Path) -> None:
    get_peft_model(load(llama), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert {peft_.CONFIG_FILE, peft_.WEIGHTS_FILE} <= {file.name for file in tmp_path.iterdir()}


def test_a_prefix_is_one_parameter_and_its_config_is_completed(llama: Path) -> None:
    model, config = load(llama), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    assert config.num_layers is None
    peft_.complete_prompt_config(config, model.config)
    assert (config.num_layers, config.token_dim) == (2, 32)
    wrapped = get_peft_model(model, config)
    assert trained_names(wrapped) == {peft_.PROMPT_PARAMETER}
    assert {*get_peft_model_state_dict(wrapped)} == {peft_.PROMPT_KEY}


def test_fused_experts_are_wrapped_twice_and_peft_warns_of_its_own_pattern(tmp_path: Path) -> None:
    model = load(tiny_qwen3_moe(tmp_path))
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with peft_.quiet_about_experts():
            names = trained_names(get_peft_model(model, config))
    assert not [str(warning.message) for warning in caught if "_pattern" in str(warning.message)]
    block = "model.layers.0.mlp.experts"
    assert peft_.module_parameter(peft_.parameter_inside(block), "lora_A") in names
    assert peft_.module_parameter(block, "lora_A") in names
    assert sum(name.endswith(peft_.FUSED_GATE_UP_B) for name in names) == 2
    with pytest.warns(RuntimeWarning, match=r"The following (rank|alpha)_pattern keys"):
        get_peft_model(load(tmp_path), config)


def test_the_weight_of_a_layer_that_is_not_quantised_is_itself() -> None:
    layer = torch.nn.Linear(3, 2)
    assert torch.equal(peft_.dequantized_weight(layer), layer.weight)


# transformers


def test_tied_parameters(tmp_path: Path) -> None:
    tied = load(tiny_llama(tmp_path / "tied", tied=True))
    assert dict(transformers_.tied_parameters(tied)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not transformers_.tied_parameters(load(tiny_llama(tmp_path / "own")))


def test_the_cache_of_a_model(llama: Path) -> None:
    cache = load(llama)(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    shapes = {tuple(state.shape) for layer in transformers_.cached_states(cache) for state in layer}
    assert len(transformers_.cached_states(cache)) == 2 and shapes == {(1, 1, 5, 32)}
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2, pad_token_id=0)
    other = MambaForCausalLM(config)(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=True)
    states = transformers_.cached_states(getattr(other, "cache_params", None))
    assert all(state is None for layer in states for state in layer)


def test_conv1d(tmp_path: Path) -> None:
    model = load(tiny_gpt2(tmp_path))
    assert transformers_.is_conv1d(model.transformer.h[0].attn.c_attn)
    assert tuple(model.transformer.h[0].attn.c_attn.weight.shape) == (64, 3 * 64)
    assert not transformers_.is_conv1d(model.lm_head)


def test_experts_as_batched_products_answer_as_before(tmp_path: Path, llama: Path) -> None:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        for path in (tiny_qwen3_moe(tmp_path), llama):
            model = load(path).eval()
            before = model(input_ids=ids).logits
            transformers_.use_batched_experts(model)
            torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)


def test_the_names_under_which_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    model = load(tiny_qwen3_moe(tmp_path))
    expert, query = (
        f"model.layers.0.{name}.weight" for name in ("mlp.experts.0.up_proj", "self_attn.q_proj")
    )
    found = dict(transformers_.loaded_names([expert, query, "other.weight"], model))
    assert found == {
        expert: ("model.layers.0.mlp.experts.gate_up_proj", True),
        query: (query, False),
    }


def test_a_trainer_on_one_device_that_loads_no_weights(llama: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    transformers_.use_one_device(arguments)
    assert arguments.n_gpu == 1
    trainer = Trainer(load(llama), arguments)
    with pytest.raises(ValueError, match="find a valid checkpoint"):
        trainer._load_from_checkpoint(str(tmp_path))
    transformers_.keep_weights_on_resume(trainer)
    trainer._load_from_checkpoint(str(tmp_path))


# torch


def test_each_of_some_tensors() -> None:
    targets, values = [torch.zeros(2), torch.zeros(3)], [torch.full((2,), 3.0), torch.full((3,), 4.0)]
    copy_each(targets, values)
    add_each(targets, values)
    assert [tensor.tolist() for tensor in targets] == [[6.0] * 2, [8.0] * 3]
    norms = norm_of_each(values)
    assert torch.allclose(torch.stack(norms), torch.tensor([18.0, 48.0]).sqrt())


def test_allocations_are_recorded_with_what_was_freed() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        numbers = torch.ones(1000)
        del numbers
    found = allocations(profile)
    assert 4000 in found and -4000 in found and sum(found) == 0


# The standard library


def test_logs_come_back_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    logger, before = logging.getLogger("qpa.test"), logging.root.manager.disable
    with without_logs(logging.WARNING):
        logger.warning("not seen")
        logger.error("seen")
    assert [record.message for record in caplog.records] == ["seen"]
    assert logging.root.manager.disable == before
