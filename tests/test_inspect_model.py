import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeConfig,
    JambaConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from qpa.adapters.attach import adapter_parameters, attach_adapter, initial_adapter
from qpa.errors import ModelError, OptionError
from qpa.models.base_model import build_on_meta
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GATED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GATED, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**GATED),
    "gemma2": Gemma2Config(**GATED, head_dim=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
}


@pytest.fixture(scope="session")
def config_paths(tmp_path_factory):
    paths = {}
    for name, config in CONFIGS.items():
        paths[name] = tmp_path_factory.mktemp(name)
        config.save_pretrained(paths[name])
    return paths


def inspect(path, **options):
    return InspectModel(model=str(path), **{"rank": 4, **options}).run(None, NOWHERE)


def modules(spec):
    return [tensor.module for tensor in spec.tensors[::2]]


def shapes(spec, module):
    return [tensor.shape for tensor in spec.tensors if tensor.module == module]


# What is found


def test_llama_shapes_and_rules(config_paths):
    spec = inspect(config_paths["llama"])
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert modules(spec) == [f"model.layers.{index}.{name}" for index in range(2) for name in layer]
    assert shapes(spec, "model.layers.0.self_attn.k_proj") == [(4, 32), (16, 4)]
    assert shapes(spec, "model.layers.1.mlp.down_proj") == [(4, 48), (32, 4)]
    assert spec.target_modules == (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    assert {(tensor.role, tensor.initial) for tensor in spec.tensors} == {
        ("lora_A", "kaiming_uniform"),
        ("lora_B", "zeros"),
    }
    assert (spec.base.model_type, spec.base.architecture) == ("llama", "LlamaForCausalLM")
    assert not spec.fan_in_fan_out
    assert not spec.base.ties_lm_head


def test_gpt2_stores_its_weights_the_other_way_round(config_paths):
    spec = inspect(config_paths["gpt2"])
    assert spec.fan_in_fan_out
    assert spec.base.ties_lm_head
    assert shapes(spec, "transformer.h.0.attn.c_attn") == [(4, 32), (96, 4)]
    assert shapes(spec, "transformer.h.0.mlp.c_fc") == [(4, 32), (128, 4)]
    assert shapes(spec, "transformer.h.1.mlp.c_proj") == [(4, 128), (32, 4)]
    assert spec.target_modules == ("c_attn", "c_proj", "c_fc")


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_leaves_the_head_out(config_paths, name):
    model = build_on_meta(CONFIGS[name], name)
    head = model.get_output_embeddings()
    head_path = next(path for path, module in model.named_modules() if module is head)
    assert head_path not in modules(inspect(config_paths[name]))
    assert len(set(modules(inspect(config_paths[name])))) >= 8


def test_the_head_is_adapted_when_it_is_named(config_paths):
    spec = inspect(config_paths["llama"], targets=("lm_head", "q_proj"))
    assert modules(spec) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    assert shapes(spec, "lm_head") == [(4, 32), (64, 4)]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("mlp.down_proj",), ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (("1.self_attn.q_proj",), ["model.layers.1.self_attn.q_proj"]),
        (
            ("model.layers.0.mlp.up_proj", "up_proj"),
            ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
        ),
    ],
)
def test_a_target_is_the_end_of_a_path(config_paths, targets, found):
    assert modules(inspect(config_paths["llama"], targets=targets)) == found


def test_one_module_of_a_type_is_named_by_its_full_path(config_paths):
    spec = inspect(config_paths["llama"], targets=("1.self_attn.q_proj", "v_proj"))
    assert sorted(spec.target_modules) == ["model.layers.1.self_attn.q_proj", "v_proj"]


def test_alpha_is_twice_the_rank_unless_given(config_paths):
    assert inspect(config_paths["llama"], rank=3).alpha == 6.0
    assert inspect(config_paths["llama"], alpha=5).alpha == 5.0


def test_the_same_config_gives_the_same_digest_and_another_gives_another(config_paths, tmp_path):
    spec = inspect(config_paths["llama"])
    assert inspect(config_paths["llama"]) == spec
    LlamaConfig(**(GATED | {"rms_norm_eps": 1e-3}), tie_word_embeddings=False).save_pretrained(tmp_path)
    assert inspect(tmp_path).base.config_digest != spec.base.config_digest
    assert inspect(tmp_path).tensors == spec.tensors


def test_names_add_to_all_linear(config_paths):
    everything = modules(inspect(config_paths["llama"]))
    assert modules(inspect(config_paths["llama"], targets=("all-linear", "lm_head"))) == [
        *everything,
        "lm_head",
    ]
    assert modules(inspect(config_paths["llama"], targets=("q_proj", "all-linear"))) == everything
    with pytest.raises(OptionError, match="found lm_haed, which matches no layer"):
        inspect(config_paths["llama"], targets=("all-linear", "lm_haed"))


TIED = {"llama": False, "qwen2": False, "gemma2": True, "gpt2": True, "gpt_neox": False, "opt": True}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_and_its_tie_are_the_models_own(config_paths, name):
    base = inspect(config_paths[name]).base
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert model.get_submodule(base.head) is model.get_output_embeddings()
    shares = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert base.ties_lm_head is shares is TIED[name]


FUSED = {
    "qwen2-moe": Qwen2MoeConfig(
        **GATED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "jamba": JambaConfig(**GATED, num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1),
    "granite-moe": GraniteMoeConfig(**GATED, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_without_a_common_form_are_not_left_out_in_silence(tmp_path, name):
    FUSED[name].save_pretrained(tmp_path)
    spec = inspect(tmp_path, rank=2)
    assert any(left.layers.endswith(".experts") for left in spec.left_out)
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} < {*spec.target_modules, ""}


def test_the_names_of_many_targets_are_counted(tmp_path):
    config = Qwen3MoeConfig(
        **GATED | {"num_hidden_layers": 8},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[0, 1, 2, 3, 4, 5, 6],
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(OptionError) as caught:
        inspect(tmp_path, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"))
    assert caught.value.found == "q_proj, k_proj, v_proj, o_proj and 2 more, which are some of them"


# What is refused


@pytest.mark.parametrize(
    ("target", "nearest"),
    [("q_porj", "q_proj"), ("down", "down_proj"), ("W_pack", "q_proj|k_proj"), ("proj", "_proj")],
)
def test_a_target_that_matches_nothing_names_the_nearest(config_paths, target, nearest):
    with pytest.raises(OptionError, match=f"targets: .* found {target}, .*nearest names are .*({nearest})"):
        inspect(config_paths["llama"], targets=("v_proj", target))


@pytest.mark.parametrize("target", ["self_attn", "model", "input_layernorm", ""])
def test_a_target_that_is_no_linear_layer_is_refused(config_paths, target):
    with pytest.raises(OptionError, match=r"names of linear layers, found .* which is no linear layer"):
        inspect(config_paths["llama"], targets=(target,))


def test_no_targets_are_refused(config_paths):
    with pytest.raises(OptionError, match=r"^targets: "):
        inspect(config_paths["llama"], targets=())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank: expected a whole number of at least 1, found 0"),
        ({"rank": -4}, "rank: expected a whole number of at least 1, found -4"),
        (
            {"rank": 17},
            r"rank: expected at most 16, the smaller side of model\.layers\.0\.self_attn\.k_proj",
        ),
        ({"alpha": 0.0}, "alpha: expected a finite number above 0, found 0"),
        ({"alpha": float("nan")}, "alpha: expected a finite number above 0, found nan"),
        ({"alpha": float("inf")}, "alpha: expected a finite number above 0, found inf"),
        ({"method": "tarot"}, "method: expected lora, .* found tarot"),
    ],
)
def test_an_option_out_of_range_is_refused(config_paths, options, message):
    with pytest.raises(OptionError, match=message):
        inspect(config_paths["llama"], **options)


def test_the_largest_rank_is_allowed(config_paths):
    assert shapes(inspect(config_paths["llama"], rank=16), "model.layers.0.self_attn.k_proj")[1] == (16, 16)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"absent: expected a model directory or Hub id, found no such directory"
    ):
        inspect(tmp_path / "absent")


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"expected a model directory with config\.json, found no config"):
        inspect(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights\.bin: .* found a file"):
        inspect(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "perceptron", "architectures": ["PerceptronForCausalLM"]},
        {"model_type": "vit"},
        {"model_type": "t5"},
        {"architectures": ["LlamaForCausalLM"]},
        {},
        [],
        {"model_type": "llama", "hidden_size": "many"},
        {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 0},
        {"model_type": 3},
    ],
    ids=str,
)
def test_a_config_of_no_causal_language_model_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        inspect(tmp_path)
    assert caught.value.subject == str(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\x00", "null"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError):
        inspect(tmp_path)


# What PEFT makes of it


def adapted_by_peft(name, spec):
    model = build_on_meta(CONFIGS[name], name)
    config = LoraConfig(
        r=spec.rank, target_modules=list(spec.target_modules), fan_in_fan_out=spec.fan_in_fan_out
    )
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT warns about tied and mixed layers; which layers it adapts is not affected.
        warnings.simplefilter("ignore", UserWarning)
        peft_model = get_peft_model(model, config)
    names = [path for path, module in peft_model.named_modules() if hasattr(module, "lora_A")]
    return {path.removeprefix("base_model.model.") for path in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_target_modules_select_exactly_these_modules_in_peft(config_paths, name):
    spec = inspect(config_paths[name])
    assert adapted_by_peft(name, spec) == set(modules(spec))


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_any_choice_of_modules_is_selected_exactly_in_peft(config_paths, name, data):
    everything = modules(inspect(config_paths[name]))
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    spec = inspect(config_paths[name], targets=tuple(chosen))
    assert set(modules(spec)) == set(chosen)
    assert adapted_by_peft(name, spec) == set(chosen)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_attached_to_a_model_is_the_specs_and_does_nothing(config_paths, name):
    spec = inspect(config_paths[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        peft_model = attach_adapter(model, spec)
        after = peft_model(input_ids=ids).logits
    assert torch.equal(before, after)
    parameters = adapter_parameters(peft_model, spec)
    assert {path: tuple(value.shape) for path, value in parameters.items()} == {
        tensor.path: tensor.shape for tensor in spec.tensors
    }
    initial = initial_adapter(spec)
    assert all(torch.equal(parameters[path], initial[path]) for path in parameters)


def test_the_first_tensor_that_is_missing_is_named_whatever_the_hash_seed(config_paths):
    spec = inspect(config_paths["llama"])
    torch.manual_seed(0)
    smaller = AutoModelForCausalLM.from_config(LlamaConfig(**(GATED | {"num_hidden_layers": 1})))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.lora_A.* a trainable tensor in PEFT"):
        attach_adapter(smaller, spec)


def test_an_adapter_of_another_model_is_refused(config_paths):
    spec = inspect(config_paths["llama"])
    torch.manual_seed(0)
    larger = AutoModelForCausalLM.from_config(LlamaConfig(**(GATED | {"intermediate_size": 64})))
    with pytest.raises(ModelError, match=r"gate_proj.* expected shape \(48, 4\), found \(64, 4\)"):
        attach_adapter(larger, spec)
