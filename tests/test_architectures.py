"""The LoRA pipeline over architectures: plan, attach, export, and what PEFT and transformers make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlavaConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from qpa.documents import AdapterSpec, read_manifest
from qpa.errors import ExportError, ModelError, OptionError
from qpa.exporters.contracts.lora import KEY_PREFIX, WEIGHTS_FILE, check_lora_contract
from qpa.exporters.formats.lora import ExportLora
from qpa.exporters.formats.merged import ExportMerged
from qpa.models.probe import greedy_continuation
from qpa.passes.inspect_model import InspectModel
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import ARCHITECTURES, tiny_gemma3_vision

ALL_LINEAR = ("all-linear",)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LAYERS = {
    "llama": GATED,
    "llama-tied": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma2": GATED,
    "gemma3": GATED,
    "phi3": ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"),
    "mistral": GATED,
    "opt": ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"),
    "gpt-neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "qwen3-moe": ATTENTION,
}
UNTIED = ("llama", "qwen2", "qwen3", "phi3", "mistral", "gpt-neox", "qwen3-moe")

ModelOf = Callable[[str], Path]
AdapterOf = Callable[[str], RandomAdapter]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """Return the function from a name to the directory of its tiny model, which is written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            write = tiny_gemma3_vision if name == "gemma3-vision" else ARCHITECTURES[name]
            made[name] = write(tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def adapter_of(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> AdapterOf:
    """Return the function from a name to a random adapter on all of its layers; see `_targets`."""
    made: dict[str, RandomAdapter] = {}

    def get(name: str) -> RandomAdapter:
        if name not in made:
            store = tmp_path_factory.mktemp("stores") / name
            made[name] = random_adapter(model_of(name), store, alpha=6.0, targets=_targets(name))
        return made[name]

    return get


def _targets(name: str) -> tuple[str, ...]:
    """Return all linear layers; the experts of a mixture are in tests/test_experts.py."""
    return ATTENTION if name == "qwen3-moe" else ALL_LINEAR


def _inspect(model: Path, *targets: str, method: str = "lora") -> AdapterSpec:
    context = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))
    return InspectModel(model=str(model), rank=4, targets=targets, method=method).run(None, context)


def _modules(made: RandomAdapter) -> set[str]:
    return {path.rpartition(".lora_")[0] for path in made.tensors}


def _check_everywhere(made: RandomAdapter, out: Path, *, allow_tied_head: bool = False) -> None:
    """Export an adapter and check that PEFT and transformers compute the live model's function."""
    ExportLora(allow_tied_head=allow_tied_head).emit(made.frozen, out, made.context)
    assert check_lora_contract(out) == ()
    assert load_file(out / WEIGHTS_FILE).keys() == {KEY_PREFIX + path for path in made.tensors}
    verify = VerifyAdapter(directory=str(out), engines=("peft", "transformers"))
    verification = verify.run(read_manifest(out), made.context)
    probe = load_file(made.context.files.get(made.frozen.probe))
    with made.live.disable_adapter():
        base_greedy = greedy_continuation(made.live, probe["input_ids"])
    assert probe["greedy"].tolist() != base_greedy.tolist()
    assert [check.engine for check in verification.engines] == ["peft", "transformers"]
    for check in verification.engines:
        assert check.max_logit_difference <= 1e-5 * probe["logits"].abs().max()
        assert check.max_base_difference >= 0.1 * probe["base_logits"].abs().max()
        assert list(check.greedy_tokens) == probe["greedy"].tolist()
        assert check.missing_keys == check.unexpected_keys == ()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engines_compute_what_the_live_model_does(name, adapter_of, tmp_path):
    _check_everywhere(adapter_of(name), tmp_path / "out")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapted_layers_are_these(name, adapter_of):
    made = adapter_of(name)
    assert made.frozen.target_modules == LAYERS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made.live.config)
    linears = {
        path for path, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    assert _modules(made) == linears - {"lm_head"}
    assert made.frozen.base.head == "lm_head"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapted_layer_matters_to_the_logits(name, adapter_of):
    made = adapter_of(name)
    ids = torch.arange(12)[None] + 33
    layers = [module for _, module in made.live.named_modules() if hasattr(module, "lora_B")]
    assert len(layers) == len(_modules(made))
    with torch.no_grad():
        expected = made.live(input_ids=ids).logits
        for layer in layers:
            scaling, layer.scaling = layer.scaling, {"default": 0.0}
            found = made.live(input_ids=ids).logits
            layer.scaling = scaling
            assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "path", "shape"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj.lora_B.weight", (64 + 32 + 32, 4)),
        ("phi3", "model.layers.1.mlp.gate_up_proj.lora_B.weight", (2 * 96, 4)),
        ("gpt-neox", "gpt_neox.layers.0.attention.query_key_value.lora_B.weight", (3 * 64, 4)),
        ("gpt2", "transformer.h.0.attn.c_attn.lora_B.weight", (3 * 64, 4)),
        ("opt", "model.decoder.layers.1.fc2.lora_A.weight", (4, 96)),
    ],
)
def test_fused_layers_have_one_adapter(name, path, shape, adapter_of):
    assert tuple(adapter_of(name).tensors[path].shape) == shape


# The head and the embedding


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", UNTIED)
def test_an_untied_head_is_adapted_beside_a_layer(name, model_of, tmp_path):
    made = random_adapter(model_of(name), tmp_path / "store", targets=(LAYERS[name][0], "lm_head"))
    assert made.frozen.target_modules == (LAYERS[name][0], "lm_head")
    assert not made.frozen.base.ties_lm_head
    assert tuple(made.tensors["lm_head.lora_B.weight"].shape) == (272, 4)
    _check_everywhere(made, tmp_path / "out")


def test_the_head_of_gpt_neox_is_named_as_in_the_model_not_as_in_its_checkpoint(model_of):
    assert "embed_out.weight" in load_file(model_of("gpt-neox") / "model.safetensors")
    assert _inspect(model_of("gpt-neox"), "lm_head").target_modules == ("lm_head",)
    with pytest.raises(OptionError, match=r"found embed_out, which matches no layer; .* lm_head"):
        _inspect(model_of("gpt-neox"), "embed_out")


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "embed_tokens"),
        ("gpt-neox", "embed_in"),
        ("gpt2", "wte"),
        ("opt", "embed_tokens"),
        ("gemma3", "embed_tokens"),
    ],
)
def test_the_embedding_of_the_tokens_is_a_target(name, target, model_of, tmp_path):
    made = random_adapter(model_of(name), tmp_path / "store", alpha=6.0, targets=("all-linear", target))
    (embedding,) = made.frozen.embeddings
    base = made.live.get_base_model()
    size, width = base.config.get_text_config().vocab_size, base.config.get_text_config().hidden_size
    assert made.tensors[f"{embedding}.lora_embedding_A"].shape == (4, size)
    assert made.tensors[f"{embedding}.lora_embedding_B"].shape == (width, 4)
    assert len(_modules(made)) == 1 + len(_modules(random_adapter(model_of(name), tmp_path / "linear")))
    _check_everywhere(made, tmp_path / "out", allow_tied_head=True)


@pytest.mark.parametrize(
    ("name", "target", "method"),
    [("opt", "embed_positions", "lora"), ("gpt2", "wpe", "lora"), ("llama", "embed_tokens", "dora")],
)
def test_other_embeddings_and_other_adapters_of_one_are_refused(name, target, method, model_of):
    with pytest.raises(OptionError) as caught:
        _inspect(model_of(name), "all-linear", target, method=method)
    assert str(caught.value).startswith(
        f"targets: expected names of linear layers, found {target}, which is an embedding; LoRA "
        "alone adapts an embedding, that of the tokens; "
    )
    assert "\n" not in str(caught.value)


def test_a_tied_embedding_is_refused_where_it_would_be_merged(model_of, tmp_path):
    made = random_adapter(model_of("gpt2"), tmp_path / "store", targets=("wte",))
    for exporter in (ExportLora(), ExportMerged()):
        with pytest.raises(ExportError, match=r"targets without the head and the embedding"):
            exporter.emit(made.frozen, tmp_path / "out", made.context)
    untied = random_adapter(model_of("llama"), tmp_path / "untied", targets=("embed_tokens",))
    manifest = ExportMerged().emit(untied.frozen, tmp_path / "merged", untied.context)
    VerifyAdapter(directory=str(tmp_path / "merged")).run(manifest, untied.context)


# Models that also see


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "mlp.up_proj")], ids=str)
def test_only_the_language_model_of_a_model_that_sees_is_adapted(targets, model_of, tmp_path):
    made = random_adapter(model_of("gemma3-vision"), tmp_path / "store", targets=targets)
    names = {name.rpartition(".")[2] for name in (GATED if targets == ALL_LINEAR else targets)}
    modules = _modules(made)
    assert all(module.startswith("model.language_model.layers.") for module in modules)
    assert len(modules) == 2 * len(names)
    assert {module.rpartition(".")[2] for module in modules} == names
    assert made.frozen.base.architecture == "Gemma3ForConditionalGeneration"
    _check_everywhere(made, tmp_path / "out")


@pytest.mark.parametrize("target", ["fc1", "vision_tower.encoder.layers.0.self_attn.q_proj"])
def test_a_layer_that_sees_is_refused(target, model_of):
    with pytest.raises(
        OptionError, match=r"names of linear layers, found .* which is a layer outside the language"
    ):
        _inspect(model_of("gemma3-vision"), "all-linear", target)


def test_the_head_of_a_model_that_sees_is_a_target(model_of):
    spec = _inspect(model_of("gemma3-vision"), "lm_head")
    assert (spec.target_modules, spec.base.ties_lm_head) == (("lm_head",), True)


def test_a_model_that_sees_and_is_no_causal_language_model_is_refused(tmp_path):
    LlavaConfig(text_config={"model_type": "llama"}, vision_config={}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected a causal language model") as caught:
        _inspect(tmp_path, "all-linear")
    assert "\n" not in str(caught.value)


# Mixtures of experts


def test_the_router_and_the_experts_stay_as_they_are(adapter_of, model_of, tmp_path):
    made = adapter_of("qwen3-moe")
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    base = AutoModelForCausalLM.from_pretrained(model_of("qwen3-moe"))
    before = {name: value.clone() for name, value in base.named_parameters() if ".mlp." in name}
    assert len(before) == 2 * len(("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    after = dict(merged.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {module.rpartition(".")[2] for module in _modules(made)} == set(ATTENTION)


@pytest.mark.parametrize("target", ["gate", "mlp.gate", "mlp.experts", "gate_up_proj"])
def test_neither_router_nor_experts_are_targets(target, model_of):
    with pytest.raises(
        OptionError, match=f"found {target}, which (is no linear|matches no|is a router)( layer)?; .*_proj"
    ):
        _inspect(model_of("qwen3-moe"), "q_proj", target)


@pytest.mark.parametrize(
    "targets", [("up_proj",), ("q_proj", "gate_proj", "up_proj"), ("q_proj", "1.mlp.experts.0.down_proj")]
)
def test_names_that_peft_takes_for_the_experts_are_refused_when_planning(targets, model_of, tmp_path):
    content = json.loads((model_of("qwen3-moe") / "config.json").read_text())
    Qwen3MoeConfig(**content | {"mlp_only_layers": [0]}).save_pretrained(tmp_path)
    assert _inspect(tmp_path, *ATTENTION).target_modules == ATTENTION
    with pytest.raises(OptionError, match=r"targets: expected all layers of all experts"):
        _inspect(tmp_path, *targets)
