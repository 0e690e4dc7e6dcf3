"""The MLX exporter in numbers, its files applied as mlx-lm's source says; tests/mlx asks mlx-lm itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qpa.documents import MANIFEST_PATH, FrozenAdapter, Manifest
from qpa.errors import ExportError, ModelError, OptionError
from qpa.exporters.contracts.manifest import check_manifest
from qpa.exporters.directory import PROBE_FILE
from qpa.exporters.formats.mlx import CONFIG_FILE, WEIGHTS_FILE, ExportMlx, keys_in_layers
from qpa.models.base_model import load_model
from tests import tiny_models
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import tiny_llama, tiny_qwen3

LINEAR = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"] + [
    f"self_attn.{kind}_proj" for kind in ("k", "o", "q", "v")
]


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a rank-4 adapter with alpha 6 on a tiny Llama with an untied head: a scaling of 1.5."""
    store = tmp_path_factory.mktemp("store")
    return random_adapter(llama, store, rank=4, alpha=6.0, targets=("all-linear", "lm_head"))


@pytest.fixture(scope="module")
def exported(made: RandomAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported directory of `made`."""
    out = tmp_path_factory.mktemp("exported") / "adapter"
    ExportMlx().emit(made.frozen, out, made.context)
    return out


def _config(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text())
    return content


def _modules_mlx_adapts(model: torch.nn.Module, config: dict[str, Any]) -> set[str]:
    """Return what `linear_to_lora_layers` converts: keys in the last layers, and keys in the model."""
    keys = set(config["lora_parameters"]["keys"])
    layers = list(model.model.layers)
    chosen = {name for name, _ in model.named_modules() if name in keys}
    # As in mlx-lm, where none is all: layers[-0:].
    for i in list(range(len(layers)))[-max(config["num_layers"], 0) :]:
        chosen |= {f"model.layers.{i}.{name}" for name, _ in layers[i].named_modules() if name in keys}
    return chosen


@torch.no_grad()
def _logits_with(model: torch.nn.Module, directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits of a base model whose layers do what mlx-lm's LoRALinear does."""
    config, tensors = _config(directory), load_file(directory / WEIGHTS_FILE)
    scale, modules = config["lora_parameters"]["scale"], _modules_mlx_adapts(model, config)
    assert tensors.keys() == {f"{module}.lora_{role}" for module in modules for role in "ab"}
    for name in modules:
        a, b = tensors[f"{name}.lora_a"].float(), tensors[f"{name}.lora_b"].float()
        model.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, a=a, b=b: output + scale * (inputs[0] @ a @ b)
        )
    return model(input_ids=tokens).logits


def test_the_directory_holds_exactly_its_files(made, exported):
    files = {file.relative_to(exported).as_posix() for file in exported.rglob("*.*")}
    assert files == {"README.md", CONFIG_FILE, WEIGHTS_FILE, PROBE_FILE, MANIFEST_PATH}
    assert {file.stat().st_mode & 0o777 for file in exported.rglob("*.*")} == {0o644}
    assert list(check_manifest(exported)) == []
    manifest = Manifest.from_json((exported / MANIFEST_PATH).read_bytes(), MANIFEST_PATH)
    assert (manifest.format, manifest.rank, manifest.dtype) == ("mlx", 4, "float32")
    assert [option.name for option in manifest.provenance.options] == ["dtype"]


def test_the_config_is_what_mlx_lm_asks_for(exported):
    assert _config(exported) == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["lm_head", *LINEAR]},
    }


def test_tensors_are_pefts_transposed_with_the_scaling_in_b(made, exported):
    with safe_open(exported / WEIGHTS_FILE, framework="pt") as reader:
        assert reader.metadata() == {"format": "mlx"}
    tensors = load_file(exported / WEIGHTS_FILE)
    assert tensors["model.layers.1.self_attn.k_proj.lora_a"].shape == (64, 4)
    assert tensors["model.layers.1.self_attn.k_proj.lora_b"].shape == (4, 32)
    for path, tensor in made.tensors.items():
        name = path.removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        assert torch.equal(tensors.pop(name), tensor.T * (1.5 if "lora_B" in path else 1.0)), path
    assert tensors == {}


@torch.no_grad()
def test_every_modules_change_is_the_live_adapters(made, exported):
    tensors = load_file(exported / WEIGHTS_FILE)
    scale = _config(exported)["lora_parameters"]["scale"]
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in made.live.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {name.rpartition(".")[0] for name in tensors} == layers.keys()
    for name, layer in layers.items():
        change = (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T * scale
        live = layer.get_delta_weight("default")
        assert live.abs().max() > 0.1 and (change - live).abs().max() <= 1e-6 * live.abs().max(), name


@pytest.mark.parametrize(
    "base",
    ["tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3", "tiny_gemma2", "tiny_gemma3", "tiny_phi3"],
)
def test_logits_are_the_live_models(base, tmp_path):
    made = random_adapter(
        getattr(tiny_models, base)(tmp_path / "base"), tmp_path / "store", rank=3, alpha=6.0
    )
    ExportMlx().emit(made.frozen, tmp_path / "out", made.context)
    tokens = torch.arange(40)[None] + 20
    model = load_model(made.frozen.base, keep_dtype=False)
    with torch.no_grad():
        live, without = made.live(input_ids=tokens).logits, model(input_ids=tokens).logits
    logits = _logits_with(model, tmp_path / "out", tokens)
    assert (logits - live).abs().max() <= 1e-5 * live.abs().max()
    assert (logits - without).abs().max() > 0.1


@pytest.mark.parametrize(
    ("targets", "n_layers", "keys"),
    [
        (("model.layers.1.self_attn.q_proj",), 1, ["self_attn.q_proj"]),
        (("lm_head",), 0, ["lm_head"]),
        (("lm_head", "model.layers.1.mlp.up_proj"), 1, ["lm_head", "mlp.up_proj"]),
    ],
)
def test_fewer_layers_are_counted_from_the_last(llama, tmp_path, targets, n_layers, keys):
    made = random_adapter(llama, tmp_path / "store", targets=targets)
    ExportMlx().emit(made.frozen, tmp_path / "out", made.context)
    config = _config(tmp_path / "out")
    assert (config["num_layers"], config["lora_parameters"]["keys"]) == (n_layers, keys)
    model = load_model(made.frozen.base, keep_dtype=False)
    assert _modules_mlx_adapts(model, config) == set(targets)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["model.layers.0.mlp.up_proj"], r"layer 1: .* found mlp\.up_proj in one of them only"),
        (["model.layers.0.a", "model.layers.1.a", "model.layers.1.b"], "layer 1"),
        (["model.layers.2.a"], r"model\.layers\.2\.a: expected a module in one of 2 layers"),
        (["model.encoder.0.a"], r"model\.encoder\.0\.a"),
    ],
)
def test_modules_that_mlx_cannot_express_are_refused(modules, words):
    with pytest.raises(ExportError, match=words):
        keys_in_layers(modules, 2)


def test_uneven_layers_leave_nothing_behind(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store", targets=("model.layers.0.self_attn.q_proj",))
    with pytest.raises(ExportError, match="use `format` lora or merged"):
        ExportMlx().emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_another_type_is_one_rounding_of_the_folded_numbers(made, exported, tmp_path, dtype, kind):
    ExportMlx(dtype=dtype).emit(made.frozen, tmp_path / "out", made.context)
    rounded = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for name, tensor in load_file(exported / WEIGHTS_FILE).items():
        assert torch.equal(rounded[name], tensor.to(kind)), name


def test_the_same_adapter_gives_the_same_bytes(made, exported, tmp_path):
    other = tmp_path / "deeper" / "elsewhere"
    ExportMlx().emit(made.frozen, other, made.context)
    for file in (file for file in exported.rglob("*") if file.is_file()):
        assert file.read_bytes() == (other / file.relative_to(exported)).read_bytes(), file


def test_the_card_says_how_to_load_it_and_how_far_it_was_checked(exported):
    card = (exported / "README.md").read_text()
    assert 'adapter_path="path/to/this/directory"' in card
    assert "not been run on Apple silicon" in card and "Nothing quantum is needed" in card


def test_a_moved_base_gives_the_same_export_and_another_is_refused(tmp_path):
    made = random_adapter(tiny_llama(tmp_path / "base"), tmp_path / "store")
    before = ExportMlx().emit(made.frozen, tmp_path / "before", made.context)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ModelError, match="no such directory"):
        ExportMlx().emit(made.frozen, tmp_path / "out", made.context)
    moved = ExportMlx(model=str(tmp_path / "moved"))
    assert moved.emit(made.frozen, tmp_path / "after", made.context) == before
    other = ExportMlx(model=str(tiny_qwen3(tmp_path / "qwen")))
    with pytest.raises(ModelError, match="another config"):
        other.emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def _with_base(made: RandomAdapter, **fields: object) -> FrozenAdapter:
    return made.frozen.model_copy(update={"base": made.frozen.base.model_copy(update=fields)})


def test_what_the_format_cannot_carry_is_refused(made, gpt2, tmp_path):
    conv1d = random_adapter(gpt2, tmp_path / "store")
    refused = (
        (conv1d.frozen, "Conv1D.*merged"),
        (_with_base(made, architecture="GPTNeoXForCausalLM"), "GPTNeoXForCausalLM; use `format` merged"),
        (_with_base(made, ties_lm_head=True), "tied to the input embedding"),
        (_with_base(made, architecture="Gemma2ForCausalLM"), "tied to the input embedding"),
    )
    for frozen, words in refused:
        with pytest.raises(ExportError, match=words):
            ExportMlx().emit(frozen, tmp_path / "out", made.context)
    with pytest.raises(OptionError, match=r"^dtype: "):
        ExportMlx(dtype="int8").emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()
