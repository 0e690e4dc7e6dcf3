"""The merged exporter: what transformers reads back, tensor by tensor, and what is refused."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from qpa.documents import MANIFEST_PATH, FrozenAdapter, read_manifest
from qpa.errors import DocumentError, ExportError, ModelError, OptionError
from qpa.exporters.contracts.manifest import check_manifest
from qpa.exporters.directory import PROBE_FILE
from qpa.exporters.formats.merged import ExportMerged, with_dtype
from qpa.models.base_checkpoint import INDEX_FILE, WEIGHTS_FILE
from qpa.models.base_model import config_file_digest
from qpa.models.probe import greedy_continuation
from qpa.passes.verify_adapter import VerifyAdapter
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import VOCABULARY_SIZE, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_qwen3

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.arange(40)[None] + 20
MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"


def _tied_llama(path: Path) -> Path:
    return tiny_llama(path, tied=True)


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a rank-4 adapter with alpha 6 on a tiny Llama: a scaling of 1.5."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"), rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def exported(made: RandomAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported directory of `made`."""
    out = tmp_path_factory.mktemp("exported") / "model"
    ExportMerged().emit(made.frozen, out, made.context)
    return out


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """Return a copy of the base of `made`, to be changed."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def _load(path: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def _check_against_live(made: RandomAdapter, out: Path, base: Path) -> None:
    """Check that a directory is the live model and not the base model."""
    merged, live = _load(out, dtype=torch.float32), _logits(made.live)
    assert (_logits(merged) - live).abs().max() <= 1e-5 * live.abs().max()
    greedy = greedy_continuation(merged, IDS[0])
    assert torch.equal(greedy, greedy_continuation(made.live, IDS[0]))
    unchanged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert not torch.equal(greedy, greedy_continuation(unchanged, IDS[0]))


def _with(made: RandomAdapter, **base: object) -> FrozenAdapter:
    return made.frozen.model_copy(update={"base": made.frozen.base.model_copy(update=base)})


def _refused(made: RandomAdapter, base: Path, words: str, **options: Any) -> None:
    """Check that an export from a base at another place is refused and leaves nothing."""
    out = base.parent / "out"
    with pytest.raises(ExportError, match=words) as caught:
        ExportMerged(model=str(base), **options).emit(made.frozen, out, made.context)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("make", [tiny_llama, _tied_llama, tiny_qwen3, tiny_gemma2, tiny_gpt2])
def test_transformers_loads_the_live_model(make: Callable[[Path], Path], tmp_path):
    base = make(tmp_path / "base")
    made = random_adapter(base, tmp_path / "store", rank=3, alpha=6.0)
    manifest = ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    assert (manifest.format, manifest.dtype, manifest.rank) == ("merged", "float32", 3)
    assert list(check_manifest(tmp_path / "out")) == []
    _check_against_live(made, tmp_path / "out", base)


def test_only_adapted_weights_change(exported, made, llama):
    base, merged = load_file(llama / WEIGHTS_FILE), load_file(exported / WEIGHTS_FILE)
    assert base.keys() == merged.keys()
    adapted = {path.partition(".lora_")[0] + ".weight" for path in made.tensors}
    assert len(adapted) == 14
    for key, weight in base.items():
        assert torch.equal(merged[key], weight) is (key not in adapted), key
    for key in adapted:
        a, b = (made.tensors[key.replace("weight", f"lora_{role}.weight")].double() for role in "AB")
        assert torch.allclose(merged[key].double(), base[key].double() + 1.5 * b @ a, rtol=0, atol=1e-6)


def test_a_large_weight_is_merged_in_blocks(made, llama, tmp_path, exported, monkeypatch):
    monkeypatch.setattr("qpa.exporters.formats.merged._BLOCK", 7 * 64)
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    whole, blocks = load_file(exported / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    for key, weight in whole.items():
        assert torch.allclose(blocks[key], weight, rtol=0, atol=1e-6), key


def test_conv1d_gets_the_transpose(gpt2, tmp_path):
    made = random_adapter(gpt2, tmp_path / "store", rank=3, alpha=6.0, targets=("h.0.attn.c_proj",))
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    key, (a, b) = "transformer.h.0.attn.c_proj", made.tensors.values()
    base, merged = (load_file(path / WEIGHTS_FILE)[f"{key}.weight"] for path in (gpt2, tmp_path / "out"))
    assert base.shape == (64, 64)
    assert torch.allclose(merged, base + (2.0 * b @ a).T, rtol=0, atol=1e-6)


def test_the_directory_is_a_model_with_all_that_belongs_to_it(exported, llama):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    copied = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == {"README.md", "config.json", WEIGHTS_FILE, PROBE_FILE, MANIFEST_PATH} | copied
    for name in copied:
        assert (exported / name).read_bytes() == (llama / name).read_bytes()
    with safe_open(exported / WEIGHTS_FILE, framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("a text")["input_ids"]) == "a text"
    assert GenerationConfig.from_pretrained(exported).eos_token_id == 0
    assert config_file_digest(str(exported)) == config_file_digest(str(llama))


def test_templates_and_vocabularies_are_copied_and_nothing_else(made, copy, tmp_path):
    wanted = ("chat_template.jinja", "merges.txt", "spiece.model", "special_tokens_map.json")
    other = ("README.md", ".hidden.json", "adapter_config.json", "training_args.bin", "model.py")
    for name in (*wanted, *other):
        (copy / name).write_text(name)
    (copy / "original").mkdir()
    (copy / "original" / "params.json").write_text("{}")
    ExportMerged(model=str(copy)).emit(made.frozen, tmp_path / "out", made.context)
    assert all((tmp_path / "out" / name).read_text() == name for name in wanted)
    assert not any((tmp_path / "out" / name).exists() for name in (*other[1:], "original"))
    assert "Merged model" in (tmp_path / "out" / "README.md").read_text()


def test_the_models_own_code_is_copied_when_it_is_needed_and_allowed(made, copy, tmp_path):
    (copy / "modeling.py").write_text("")
    frozen = _with(made, trust_remote_code=True)
    with pytest.raises(ModelError, match="`trust_remote_code`"):
        ExportMerged(model=str(copy)).emit(frozen, tmp_path / "out", made.context)
    export = ExportMerged(model=str(copy), trust_remote_code=True)
    manifest = export.emit(frozen, tmp_path / "out", made.context)
    assert "modeling.py" in {entry.file for entry in manifest.files}
    assert "--trust-remote-code" in (tmp_path / "out" / "README.md").read_text()


def test_the_same_adapter_gives_the_same_bytes(exported, made, copy, tmp_path):
    other = tmp_path / "deeper" / "elsewhere"
    ExportMerged(model=str(copy)).emit(made.frozen, other, made.context)
    ExportMerged(model=str(copy)).emit(made.frozen, other, made.context, force=True)
    names = [path.relative_to(exported) for path in exported.rglob("*") if path.is_file()]
    assert len(names) == 8
    for name in names:
        assert (exported / name).read_bytes() == (other / name).read_bytes(), name


# Shards


@pytest.fixture(scope="module")
def sharded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base of `made`, saved in several files."""
    path = tmp_path_factory.mktemp("models") / "sharded"
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.save_pretrained(path, max_shard_size="100KB")
    return path


@pytest.mark.parametrize(("dtype", "n_item_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_shards_stay_shards(made, sharded, llama, tmp_path, dtype, n_item_bytes):
    out = tmp_path / "out"
    ExportMerged(model=str(sharded), dtype=dtype).emit(made.frozen, out, made.context)
    names = {path.name for path in sharded.glob("*.safetensors")}
    assert len(names) >= 3 and {path.name for path in out.glob("*.safetensors")} == names
    found, expected = (json.loads((path / INDEX_FILE).read_text()) for path in (out, sharded))
    assert found["weight_map"] == expected["weight_map"]
    n_numbers = sum(tensor.numel() for tensor in load_file(llama / WEIGHTS_FILE).values())
    assert found["metadata"] == expected["metadata"] | {"total_size": n_numbers * n_item_bytes}
    assert list(check_manifest(out)) == []
    if dtype == "float32":
        _check_against_live(made, out, llama)


def test_shards_hold_the_numbers_of_the_single_file(made, sharded, exported, tmp_path):
    ExportMerged(model=str(sharded)).emit(made.frozen, tmp_path / "out", made.context)
    single, shards = load_file(exported / WEIGHTS_FILE), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        shards |= load_file(path)
    assert shards.keys() == single.keys()
    assert all(torch.equal(shards[key], single[key]) for key in single)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda places: places | {"extra": next(iter(places.values()))}, "it in no file"),
        (lambda places: places | {WEIGHT: places["lm_head.weight"]}, f"expected {WEIGHT} in"),
        (lambda places: {key: f"../{name}" for key, name in places.items()}, "a weight_map"),
        (lambda places: None, "a weight_map"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_refused(made, sharded, tmp_path, change, words):
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    index = json.loads((base / INDEX_FILE).read_text())
    (base / INDEX_FILE).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))
    _refused(made, base, words)


def test_a_tensor_in_two_files_is_refused(made, sharded, tmp_path):
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    places = json.loads((base / INDEX_FILE).read_text())["weight_map"]
    other = base / next(name for name in places.values() if name != places[WEIGHT])
    save_file(load_file(other) | {WEIGHT: torch.zeros(64, 64)}, other, {"format": "pt"})
    _refused(made, base, "expected one tensor, found model-")


def test_a_missing_shard_is_one_error(made, sharded, tmp_path):
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    next(base.glob("*.safetensors")).unlink()
    with pytest.raises(DocumentError, match="a whole safetensors file"):
        ExportMerged(model=str(base)).emit(made.frozen, tmp_path / "out", made.context)


# Types


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_one_rounding_of_the_merged_numbers(made, exported, tmp_path, dtype):
    out, kind = tmp_path / "out", getattr(torch, dtype)
    manifest = ExportMerged(dtype=dtype).emit(made.frozen, out, made.context)
    assert manifest.dtype == dtype
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"
    whole, cast = load_file(exported / WEIGHTS_FILE), load_file(out / WEIGHTS_FILE)
    assert all(torch.equal(cast[key], whole[key].to(kind)) for key in whole)
    model, live = _load(out, dtype="auto"), _logits(made.live)
    assert model.dtype == kind
    error = (_logits(_load(out, dtype=torch.float32)) - live).abs().max() / live.abs().max()
    assert error < (0.05 if dtype == "bfloat16" else 0.01)


def test_a_base_of_another_type_is_read_exactly(made, copy, tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(copy / WEIGHTS_FILE).items()}
    tensors["model.layers.0.counts"] = torch.tensor([2**40, -1])
    save_file(tensors, copy / WEIGHTS_FILE, {"format": "pt"})
    ExportMerged(model=str(copy)).emit(made.frozen, tmp_path / "out", made.context)
    merged = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert torch.equal(merged["model.layers.0.counts"], tensors["model.layers.0.counts"])
    assert torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"].float())
    a, b = (made.tensors[f"{MODULE}.lora_{role}.weight"] for role in "AB")
    expected = tensors[WEIGHT].float() + 1.5 * b @ a
    assert merged[WEIGHT].dtype == torch.float32
    assert torch.allclose(merged[WEIGHT], expected, rtol=0, atol=1e-6)


def test_numbers_too_large_for_the_type_are_refused(made, copy):
    tensors = load_file(copy / WEIGHTS_FILE)
    tensors["lm_head.weight"][3, 5] = -1e5
    save_file(tensors, copy / WEIGHTS_FILE, {"format": "pt"})
    words = r"lm_head.weight: expected finite float16 numbers, found one too large: 1.0e\+05; use bfloat16"
    _refused(made, copy, words, dtype="float16")
    tensors["lm_head.weight"][3, 5] = 3.4e38
    save_file(tensors, copy / WEIGHTS_FILE, {"format": "pt"})
    _refused(made, copy, "finite bfloat16 numbers, .*; use float32", dtype="bfloat16")


def test_infinity_in_a_tensor_that_is_not_adapted_is_kept(made, copy, tmp_path):
    tensors = load_file(copy / WEIGHTS_FILE) | {"model.mask": torch.tensor([0.0, -torch.inf])}
    save_file(tensors, copy / WEIGHTS_FILE, {"format": "pt"})
    ExportMerged(model=str(copy), dtype="float16").emit(made.frozen, tmp_path / "out", made.context)
    mask = load_file(tmp_path / "out" / WEIGHTS_FILE)["model.mask"]
    assert torch.equal(mask, torch.tensor([0.0, -torch.inf], dtype=torch.float16))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_is_refused(made, copy, number):
    tensors = load_file(copy / WEIGHTS_FILE)
    tensors[WEIGHT][0, 0] = number
    save_file(tensors, copy / WEIGHTS_FILE, {"format": "pt"})
    _refused(made, copy, f"{WEIGHT}: expected finite numbers after merging, found NaN or infinity")


def test_tensors_of_any_shape_are_cast(made, copy, tmp_path):
    odd = {
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(3, 0),
        "experts": torch.linspace(0, 1, 24).reshape(2, 3, 4),
    }
    save_file(load_file(copy / WEIGHTS_FILE) | odd, copy / WEIGHTS_FILE, {"format": "pt"})
    ExportMerged(model=str(copy), dtype="bfloat16").emit(made.frozen, tmp_path / "out", made.context)
    merged = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert all(torch.equal(merged[key], tensor.bfloat16()) for key, tensor in odd.items())


def test_an_unknown_type_is_one_error(made, tmp_path):
    with pytest.raises(OptionError, match=r"^dtype: expected float32, bfloat16 or float16, found int8"):
        ExportMerged(dtype="int8").emit(made.frozen, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


def test_a_config_names_one_type_everywhere():
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "rope": {"a": 1}}, "n": [1]}
    assert with_dtype(config, "float16") == {
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16", "rope": {"a": 1}},
        "n": [1],
    }
    assert with_dtype({"n": 1}, "float32") == {"n": 1, "dtype": "float32"}


# Names


def _renamed(base: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(base / WEIGHTS_FILE)
    renamed = {rename(key): tensor for key, tensor in tensors.items()}
    save_file(renamed, base / WEIGHTS_FILE, {"format": "pt"})


def test_a_checkpoint_without_the_models_prefix_keeps_its_names(gpt2, tmp_path):
    base = Path(shutil.copytree(gpt2, tmp_path / "base"))
    _renamed(base, lambda key: key.removeprefix("transformer."))
    made = random_adapter(base, tmp_path / "store", rank=3, alpha=6.0)
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    keys = load_file(base / WEIGHTS_FILE).keys()
    assert "h.0.attn.c_attn.weight" in keys
    assert load_file(tmp_path / "out" / WEIGHTS_FILE).keys() == keys
    _check_against_live(made, tmp_path / "out", base)


def _gemma3_with_vision(path: Path) -> Path:
    """Write a Gemma3 with a language_model.model in its checkpoint and a model.language_model in memory."""
    text = Gemma3TextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.15,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=0, bos_token_id=None
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def test_names_that_transformers_changes_are_followed(tmp_path):
    base, out = _gemma3_with_vision(tmp_path / "base"), tmp_path / "out"
    made = random_adapter(base, tmp_path / "store", rank=3, targets=("language_model.layers.0.mlp.up_proj",))
    assert {path.partition(".lora_")[0] for path in made.tensors} == {
        "model.language_model.layers.0.mlp.up_proj"
    }
    ExportMerged().emit(made.frozen, out, made.context)
    before, after = load_file(base / WEIGHTS_FILE), load_file(out / WEIGHTS_FILE)
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {"language_model.model.layers.0.mlp.up_proj.weight"}
    live = _logits(made.live)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert (_logits(merged) - live).abs().max() <= 1e-5 * live.abs().max()


def test_a_module_without_a_weight_is_refused(made, copy):
    _renamed(copy, lambda key: key.replace("layers.1.mlp.up_proj", "layers.1.mlp.other"))
    _refused(made, copy, r"model\.layers\.1\.mlp\.up_proj: expected a weight in the checkpoint, found none")


def test_a_module_with_two_weights_is_refused(made, copy):
    tensors = load_file(copy / WEIGHTS_FILE)
    save_file(tensors | {WEIGHT.removeprefix("model."): tensors[WEIGHT].clone()}, copy / WEIGHTS_FILE)
    _refused(made, copy, f"{MODULE}: expected one weight in the checkpoint, found ")


def test_a_weight_that_is_converted_when_loaded_is_refused(made, copy, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    converter = WeightConverter("q_proj.weight", "q_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    _refused(made, copy, "which transformers converts when it loads it; use another format")


@pytest.mark.parametrize("weight", [torch.zeros(64, 63), torch.zeros(64, 64, dtype=torch.int64)])
def test_a_weight_that_does_not_fit_is_refused(made, copy, weight):
    save_file(load_file(copy / WEIGHTS_FILE) | {WEIGHT: weight}, copy / WEIGHTS_FILE)
    _refused(made, copy, r"expected floating-point numbers\[64, 64\], found (F32\[64, 63\]|I64\[64, 64\])")


def test_a_type_that_numpy_has_not_is_refused(made, copy):
    tensors = load_file(copy / WEIGHTS_FILE) | {"phase": torch.zeros(2, dtype=torch.complex64)}
    save_file(tensors, copy / WEIGHTS_FILE)
    _refused(made, copy, "phase in .*: expected a type among F64, .*found C64")


# Heads


@pytest.mark.parametrize("known", [True, False])
def test_a_tied_head_is_refused(tmp_path, known):
    base = tiny_llama(tmp_path / "base", tied=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        made = random_adapter(base, tmp_path / "store", targets=("q_proj", "lm_head"))
    frozen = made.frozen if known else _with(made, ties_lm_head=False)
    with pytest.raises(ExportError, match="a weight of its own to merge into, found one shared"):
        ExportMerged().emit(frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def test_an_untied_head_is_merged(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store", targets=("lm_head",))
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    _check_against_live(made, tmp_path / "out", llama)


# Bases


def test_another_base_is_refused(made, tmp_path):
    other = tiny_qwen3(tmp_path / "other")
    with pytest.raises(ModelError, match="the config the adapter was planned for"):
        ExportMerged(model=str(other)).emit(made.frozen, tmp_path / "out", made.context)
    with pytest.raises(ModelError, match="no such directory"):
        ExportMerged(model=str(tmp_path / "none")).emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def test_a_base_without_safetensors_is_refused(made, copy):
    (copy / WEIGHTS_FILE).unlink()
    _refused(made, copy, f"expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither; save the base model")
    torch.save({}, copy / "pytorch_model.bin")
    _refused(made, copy, r"found pytorch_model\.bin, which is a pickle file")


def test_a_damaged_base_is_one_error(made, copy, tmp_path):
    (copy / WEIGHTS_FILE).write_bytes((copy / WEIGHTS_FILE).read_bytes()[:-100])
    with pytest.raises(DocumentError, match="a whole safetensors file"):
        ExportMerged(model=str(copy)).emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
def test_a_quantised_base_is_refused(made, copy, where):
    config = json.loads((copy / "config.json").read_text())
    content = {"quant_method": "fp8"}
    config[where] = content if where == "quantization_config" else {"quantization_config": content}
    (copy / "config.json").write_text(json.dumps(config))
    frozen = _with(made, config_digest=config_file_digest(str(copy)))
    out = copy.parent / "out"
    with pytest.raises(ExportError, match="a base model that is not quantised, found one that is"):
        ExportMerged(model=str(copy)).emit(frozen, out, made.context)
    assert not out.exists()


def test_damaged_arrays_are_refused(made, tmp_path):
    tensors = made.tensors | {f"{MODULE}.lora_B.weight": torch.full((64, 4), torch.nan)}
    arrays = made.context.files.put("{sha256}.safetensors", save(tensors))
    with pytest.raises(ExportError, match="NaN or infinity"):
        ExportMerged().emit(made.frozen.model_copy(update={"arrays": arrays}), tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_stays(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="no qpa export"):
        ExportMerged().emit(made.frozen, out, made.context, force=True)
    (out / "notes.txt").unlink()
    manifest = ExportMerged().emit(made.frozen, out, made.context)
    with pytest.raises(ExportError, match="`force`"):
        ExportMerged().emit(made.frozen, out, made.context)
    assert read_manifest(out) == manifest


def test_a_base_on_the_hub_is_read_from_its_snapshot(made, llama, exported, tmp_path, monkeypatch):
    from huggingface_hub import constants

    revision = "0123456789" * 4
    folder = tmp_path / "hub" / "models--owner--base"
    shutil.copytree(llama, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    frozen = _with(made, name_or_path="owner/base", local=False, revision="main")
    ExportMerged().emit(frozen, tmp_path / "out", made.context)
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (exported / WEIGHTS_FILE).read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "owner/base"\nbase_model_relation: merge\nlibrary_name: transformers' in card


def test_the_card_says_how_to_load_it(exported):
    card = (exported / "README.md").read_text()
    assert "tags:\n- merged\n- qpa\n---" in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/directory", dtype="auto")' in card
    assert "vllm serve path/to/this/directory\n" in card


# Memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_at_a_time_is_in_memory(tmp_path, dtype):
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    made = random_adapter(base, tmp_path / "store", rank=4)
    export = ExportMerged(dtype=dtype)
    tracemalloc.start()
    export.emit(made.frozen, tmp_path / "out", made.context)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 8192 * 512 * 4
    assert (base / WEIGHTS_FILE).stat().st_size > 4.5 * largest
    assert peak_bytes < (1.2 if dtype == "float32" else 1.8) * largest
    n_item_bytes = 4 if dtype == "float32" else 2
    sizes = [(path / WEIGHTS_FILE).stat().st_size for path in (base, tmp_path / "out")]
    assert sizes[1] == pytest.approx(sizes[0] * n_item_bytes / 4, rel=1e-3)


def test_verify_asks_transformers_of_a_merged_directory(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store", alpha=6.0)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2.0)):
        out = tmp_path / dtype
        manifest = ExportMerged(dtype=dtype).emit(made.frozen, out, made.context)
        (check,) = (
            VerifyAdapter(directory=str(out), engines=("transformers",)).run(manifest, made.context).engines
        )
        assert check.max_logit_difference < tolerance < check.max_base_difference
        assert check.missing_keys == check.unexpected_keys == ()
        assert check.greedy_tokens_equal or dtype != "float32"
