"""LoRA on fused experts: what PEFT holds for all experts at once, named and exported one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qpa.adapters.attach import adapter_parameters, attach_adapter, set_adapter
from qpa.adapters.experts import expert_layer, expert_layers
from qpa.errors import ExportError, OptionError
from qpa.exporters.contracts.lora import CONFIG_FILE, WEIGHTS_FILE, check_lora_contract
from qpa.exporters.registry import exporter_for
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.training.generated_adapter import attach_generator
from tests.random_adapter import RandomAdapter, random_adapter
from tests.small_specs import NOWHERE
from tests.tiny_architectures import tiny
from tests.tiny_models import tiny_qwen3_moe

# peft asks transformers by a name that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # peft gives fused experts twice the rank by a pattern, and then looks for it among the modules only.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]

BLOCK = "model.layers.1.mlp.experts"
IDS = torch.arange(20)[None] + 40
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3-MoE of 2 layers with 4 experts each."""
    return tiny_qwen3_moe(tmp_path_factory.mktemp("moe") / "base")


@pytest.fixture(scope="module")
def made(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a rank-3 adapter on attention and experts, with a scaling of 2."""
    return random_adapter(moe, tmp_path_factory.mktemp("store"), rank=3, alpha=6.0)


def inspected(model: Path, *targets: str):
    return InspectModel(model=str(model), rank=3, targets=targets or None).run(None, NOWHERE)


def test_all_linear_is_every_layer_of_every_expert(moe):
    spec = inspected(moe)
    experts = [a.module for a, _ in spec.pairs if expert_layer(a.module)]
    assert len(experts) == len(set(experts)) == 2 * 4 * 3
    shapes = {tensor.path: tensor.shape for tensor in spec.tensors}
    assert shapes[f"{BLOCK}.3.up_proj.lora_A.weight"] == (3, 64)
    assert shapes[f"{BLOCK}.3.up_proj.lora_B.weight"] == (48, 3)
    assert shapes[f"{BLOCK}.3.down_proj.lora_A.weight"] == (3, 48)
    assert {"gate_proj", "up_proj", "down_proj"} < set(spec.target_modules)
    assert spec.n_layers == PlanLayout().run(spec, NOWHERE).n_circuits == 2


def test_every_part_is_a_tensor_of_its_own(moe):
    spec = inspected(moe)
    model = attach_adapter(load_model(spec.base, keep_dtype=False), spec)
    parameters = adapter_parameters(model, spec)
    for number, (path, parameter) in enumerate(parameters.items()):
        set_adapter(parameters, {path: torch.full(parameter.shape, float(number + 1))})
    for number, parameter in enumerate(parameters.values()):
        assert bool((parameter.detach() == number + 1).all())
    fused = dict(model.named_parameters())[f"base_model.model.{BLOCK}.base_layer.lora_B.default.weight"]
    by_expert = fused.detach().view(2, 48, 2, 3, 4)
    assert not by_expert[0, :, 1].any() and not by_expert[1, :, 0].any()
    assert bool(by_expert[0, :, 0].all()) and bool(by_expert[1, :, 1].all())


@torch.no_grad()
def test_an_experts_layer_is_w_plus_s_b_a(made, moe):
    """Compare with a model whose fused weights are changed by hand."""
    base = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32).eval()
    for module in made.frozen.modules:
        layer = expert_layer(module)
        a, b = (made.tensors[f"{module}.lora_{role}.weight"] for role in "AB")
        weight = layer.weight(base) if layer else base.get_submodule(module).weight
        weight += 2.0 * b @ a
    difference = (base(input_ids=IDS).logits - made.live(input_ids=IDS).logits).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize("plan", [PlanLayout(), PlanLayout(generator="state", layers=2)])
def test_the_generator_moves_the_experts(moe, plan):
    spec = inspected(moe)
    generator = make_generator(plan.run(spec, NOWHERE), 0)
    adapted = attach_generator(
        load_model(spec.base, keep_dtype=False), spec, generator, lr=2e-2, angle_lr=2e-2
    )
    model, parameters, optimizer = adapted.model, adapted.parameters, adapted.optimizer
    adapted.calibrate(spec, lambda ids: model(input_ids=ids, labels=ids).loss, [IDS])
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(parameters[f"{BLOCK}.{i}.up_proj.lora_B.weight"].detach().any() for i in range(4))
    assert len(optimizer.param_groups[0]["params"]) == 2 * 4 * 2 + 2 * 4


def test_what_clips_gradients_sees_only_what_is_trained(moe):
    spec = inspected(moe)
    model = attach_adapter(load_model(spec.base, keep_dtype=False), spec)
    parameters = adapter_parameters(model, spec)
    model(input_ids=IDS, labels=IDS).loss.backward()
    leaves = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    parts = [parameter.grad for parameter in parameters.values()]
    norms = [torch.stack([part.norm() for part in tensors]).norm() for tensors in (leaves, parts)]
    assert torch.allclose(norms[0], norms[1], rtol=1e-6)
    mixed = dict(model.named_parameters())[f"base_model.model.{BLOCK}.base_layer.lora_B.default.weight"]
    assert bool(mixed.grad.any()) and not mixed.grad.view(2, 48, 2, 3, 4)[0, :, 1].any()


@pytest.mark.parametrize("targets", [(), ("down_proj",), ("q_proj", "gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("format_", ["lora", "merged", "onnx"])
def test_engines_read_the_live_model(moe, tmp_path, targets, format_):
    made = random_adapter(moe, tmp_path / "store", rank=3, alpha=6.0, targets=targets or None, scale=0.1)
    manifest = exporter_for(format_, {}).emit(made.frozen, tmp_path / "out", made.context)
    document = VerifyAdapter(directory=str(tmp_path / "out")).run(manifest, made.context)
    assert all(check.greedy_tokens_equal for check in document.engines)


def test_files_name_every_expert(made, moe, tmp_path):
    exporter_for("lora", {"rank_pad": 8}).emit(made.frozen, tmp_path / "out", made.context)
    assert check_lora_contract(tmp_path / "out") == ()
    with safe_open(tmp_path / "out" / WEIGHTS_FILE, "pt") as file:
        shape = file.get_slice(f"base_model.model.{BLOCK}.2.gate_proj.lora_B.weight").get_shape()
        assert shape == [48, 8] and len(file.keys()) == 2 * (24 + 8)
    assert "gate_proj" in json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["target_modules"]
    base = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=IDS).logits, made.live(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize("format_", ["onnx-adapter", "genai", "gguf", "mlx"])
def test_formats_without_experts_say_so(made, tmp_path, format_):
    with pytest.raises(ExportError, match=r"one on experts; use lora, merged or onnx$"):
        exporter_for(format_, {}).emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "targets",
    [("gate_proj",), ("gate_proj", "up_proj"), ("experts.0.down_proj",), ("gate_proj", "down_proj")],
)
def test_what_peft_reads_otherwise_is_refused(moe, targets):
    with pytest.raises(OptionError, match=r"expected all layers of all experts, or none of them, found .*"):
        inspected(moe, *targets)


def test_another_kind_leaves_the_experts_out_and_says_so(moe):
    spec = InspectModel(model=str(moe), method="dora").run(None, NOWHERE)
    (left,) = spec.left_out
    assert (left.layers, left.n_layers) == ("model.layers.*.mlp.experts", 2)
    assert {tensor.module_type for tensor in spec.tensors} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss", "qwen3-next"])
@torch.no_grad()
def test_every_form_of_an_experts_layer_is_w_plus_s_b_a(name, tmp_path):
    """Compare with a model whose weights, of experts, shared and dense layers, are changed by hand."""
    model = tiny(name, tmp_path / "base")
    made = random_adapter(model, tmp_path / "store", rank=3, alpha=6.0, targets=("experts", "all-linear"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for module in made.frozen.modules:
        layer = expert_layer(module)
        a, b = (made.tensors[f"{module}.lora_{role}.weight"] for role in "AB")
        weight = layer.weight(base) if layer else base.get_submodule(module).weight
        weight += 2.0 * b @ a
    difference = (base(input_ids=IDS).logits - made.live(input_ids=IDS).logits).abs().max()
    assert difference < 5e-5


def test_a_file_of_stacked_experts_is_pefts_own(tmp_path):
    made = random_adapter(
        tiny("gpt-oss", tmp_path / "base"), tmp_path / "store", rank=3, targets=("experts",)
    )
    exporter_for("lora", {"rank_pad": 4}).emit(made.frozen, tmp_path / "out", made.context)
    assert check_lora_contract(tmp_path / "out") == ()
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    with safe_open(tmp_path / "out" / WEIGHTS_FILE, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes == {
        f"base_model.model.{BLOCK.replace('1', layer)}.{inner}{role}.weight": shape
        for layer in "01"
        for inner, role, shape in (
            ("base_layer.", "lora_A", [16, 64]),
            ("base_layer.", "lora_B", [192, 16]),
            ("", "lora_A", [16, 96]),
            ("", "lora_B", [64, 16]),
        )
    }


def test_dense_layers_beside_experts_are_adapted_too(tmp_path):
    config = Qwen3MoeConfig(**SMALL, num_key_value_heads=2, mlp_only_layers=[0], num_experts=2)
    config.save_pretrained(tmp_path)
    spec = inspected(tmp_path)
    assert spec.target_parameters == ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert {t.module for t in spec.tensors if ".0.mlp." in t.module} == {
        f"model.layers.0.mlp.{layer}_proj" for layer in ("gate", "up", "down")
    }
    assert not spec.left_out


def test_a_model_without_fused_experts_has_no_expert_layers(llama):
    spec = inspected(llama)
    assert not expert_layers(load_model(spec.base, keep_dtype=False))
    assert expert_layer("model.layers.0.mlp.experts.gate_up_proj") is None
