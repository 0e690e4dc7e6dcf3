"""The private and undocumented names of other libraries that qpa uses are still there, and mean the same."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, Conv1D, DynamicCache, Trainer, TrainingArguments

from qpa.compat import peft_, torch_, transformers_
from qpa.compat.logging_ import without_logs
from tests.tiny_architectures import tiny_config
from tests.tiny_models import byte_tokenizer, tiny_qwen3_moe


@pytest.fixture
def model(llama: Path):
    return AutoModelForCausalLM.from_pretrained(llama)


def test_peft_names_parameters_and_keys_as_before(model) -> None:
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), adapter_name=peft_.ADAPTER_NAME)
    module = "model.layers.0.self_attn.q_proj"
    assert peft_.module_parameter(module, "lora_A") in dict(wrapped.named_parameters())
    key = f"{peft_.KEY_PREFIX}{module}.lora_A.weight"
    assert key in get_peft_model_state_dict(wrapped, adapter_name=peft_.ADAPTER_NAME)
    layer = wrapped.get_base_model().get_submodule(module)
    assert peft_.is_adapted(layer) and not peft_.is_adapted(layer.base_layer)
    assert peft_.parameter_inside(module) in dict(wrapped.get_base_model().named_modules())
    assert torch.equal(peft_.dequantized_weight(layer.base_layer), layer.base_layer.weight)


def test_peft_names_and_completes_prefixes_as_before(model) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft_.complete_prompt_config(config, model.config)
    assert config.num_layers == model.config.num_hidden_layers and config.token_dim > 0
    wrapped = get_peft_model(model, config, adapter_name=peft_.ADAPTER_NAME)
    assert peft_.PROMPT_PARAMETER in dict(wrapped.named_parameters())
    assert peft_.PROMPT_KEY in get_peft_model_state_dict(wrapped, adapter_name=peft_.ADAPTER_NAME)


def test_the_warning_about_experts_is_kept_away() -> None:
    with warnings.catch_warnings(), peft_.quiet_about_experts():
        warnings.warn("The following rank_pattern keys were not found", RuntimeWarning, stacklevel=1)


def test_transformers_tells_tied_parameters_and_caches_as_before(model, gpt2: Path) -> None:
    assert transformers_.is_conv1d(Conv1D(2, 3)) and not transformers_.is_conv1d(torch.nn.Linear(2, 3))
    tied = AutoModelForCausalLM.from_pretrained(gpt2)
    assert tied.config.tie_word_embeddings and "lm_head.weight" in transformers_.tied_parameters(tied)
    answer = model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=True)
    assert isinstance(answer.past_key_values, DynamicCache)
    states = transformers_.cached_states(answer.past_key_values)
    assert len(states) == model.config.num_hidden_layers
    assert all(isinstance(keys, torch.Tensor) and keys.ndim == 4 for keys, _ in states)
    assert transformers_.cached_states(SimpleNamespace(layers=[object()])) == [(None, None)]


def test_transformers_renames_the_keys_of_a_checkpoint_as_before(model) -> None:
    found = dict(transformers_.loaded_names(model.state_dict(), model))
    assert found["model.layers.0.mlp.up_proj.weight"] == ("model.layers.0.mlp.up_proj.weight", False)
    # A checkpoint of the base model alone has no prefix.
    stripped = dict(transformers_.loaded_names(["layers.0.mlp.up_proj.weight"], model))
    assert stripped["layers.0.mlp.up_proj.weight"][0] == "model.layers.0.mlp.up_proj.weight"


def test_transformers_trainer_has_what_is_replaced(tmp_path: Path) -> None:
    assert callable(Trainer._load_from_checkpoint)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert hasattr(arguments, "_n_gpu")
    transformers_.use_one_device(arguments)
    assert arguments.n_gpu == 1


def test_torch_works_on_lists_of_tensors_as_before() -> None:
    targets = [torch.zeros(2), torch.zeros(3)]
    torch_.copy_each(targets, [torch.ones(2), torch.full((3,), 2.0)])
    torch_.add_each(targets, [torch.ones(2), torch.ones(3)])
    assert [target.tolist() for target in targets] == [[2.0, 2.0], [3.0, 3.0, 3.0]]
    norms = torch_.norm_of_each(targets)
    torch.testing.assert_close(torch.stack(norms), torch.tensor([8.0, 27.0]).sqrt())


def test_fused_experts_are_wrapped_twice_and_peft_warns_of_its_own_pattern(tmp_path: Path) -> None:
    model = _load(tiny_qwen3_moe(tmp_path))
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with peft_.quiet_about_experts():
            names = {*dict(get_peft_model(model, config).named_parameters())}
    assert not [str(warning.message) for warning in caught if "_pattern" in str(warning.message)]
    block = "model.layers.0.mlp.experts"
    assert peft_.module_parameter(peft_.parameter_inside(block), "lora_A") in names
    assert peft_.module_parameter(block, "lora_A") in names
    assert sum(name.endswith(peft_.FUSED_GATE_UP_B) for name in names) == 2
    with pytest.warns(RuntimeWarning, match=r"The following (rank|alpha)_pattern keys"):
        get_peft_model(_load(tmp_path), config)


@pytest.mark.parametrize(
    ("name", "names", "is_transposed"),
    [
        ("mixtral", {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}, False),
        (
            "deepseek-v3",
            {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
            False,
        ),
        ("gpt-oss", {}, True),
        ("llama4", {}, False),
    ],
)
def test_peft_and_transformers_say_how_experts_are_named_and_stored(
    name: str, names: dict[str, str], is_transposed: bool
) -> None:
    config = tiny_config(name)
    assert peft_.names_of_experts(config.model_type) == names | ({"gate": "gate.weight"} if names else {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = [module for path, module in model.named_modules() if path.endswith(".experts")]
    assert [transformers_.stores_experts_transposed(block) for block in blocks] == [is_transposed] * len(
        blocks
    )
    assert blocks


def test_experts_as_batched_products_answer_as_before(tmp_path: Path, llama: Path) -> None:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        for path in (tiny_qwen3_moe(tmp_path), llama):
            model = _load(path).eval()
            before = model(input_ids=ids).logits
            transformers_.use_batched_experts(model)
            torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)


def test_transformers_fuses_the_experts_of_a_checkpoint(tmp_path: Path) -> None:
    model, expert = _load(tiny_qwen3_moe(tmp_path)), "model.layers.0.mlp.experts.0.up_proj.weight"
    found = dict(transformers_.loaded_names([expert], model))
    assert found == {expert: ("model.layers.0.mlp.experts.gate_up_proj", True)}


def test_a_trainer_that_keeps_its_weights_reads_no_checkpoint(model, tmp_path: Path) -> None:
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match="find a valid checkpoint"):
        trainer._load_from_checkpoint(str(tmp_path))
    transformers_.keep_weights_on_resume(trainer)
    trainer._load_from_checkpoint(str(tmp_path))


def test_torch_records_what_was_allocated_and_freed() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        numbers = torch.ones(1000)
        del numbers
    found = torch_.allocations(profile)
    assert 4000 in found and -4000 in found and sum(found) == 0


def test_logs_come_back_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    logger, before = logging.getLogger("qpa.test"), logging.root.manager.disable
    with without_logs(logging.WARNING):
        logger.warning("not seen")
        logger.error("seen")
    assert [record.message for record in caplog.records] == ["seen"]
    assert logging.root.manager.disable == before


def _load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path)


def test_transformers_says_where_a_template_generates() -> None:
    tokenizer = byte_tokenizer()
    template = (
        "{% for message in messages %}{{ message.role }}: "
        "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{{ end }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    text, marks = transformers_.render_with_marks(template, messages, tokenizer, end=";", tools=None)
    assert text == "user: Why?<|endoftext|>;assistant: So.<|endoftext|>;"
    assert [text[start:end] for start, end in marks] == ["Why?<|endoftext|>", "So.<|endoftext|>"]
