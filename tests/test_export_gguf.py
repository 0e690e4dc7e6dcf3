"""The GGUF exporter: what gguf's own reader finds in its file, the rotary layout, and its refusals."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from qpa.documents import MANIFEST_PATH, FrozenAdapter, Manifest
from qpa.errors import ExportError, ModelError, OptionError
from qpa.exporters.contracts.manifest import check_manifest
from qpa.exporters.directory import PROBE_FILE
from qpa.exporters.formats.gguf import WEIGHTS_FILE, ExportGguf, rows_in_pairs
from qpa.passes.verify_adapter import VerifyAdapter
from tests import tiny_models
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import tiny_llama, tiny_qwen3

SUFFIXES = {"lora_a": "lora_A", "lora_b": "lora_B"}
LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PHI3_LAYERS = LAYERS | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
N_HEADS = {"self_attn.q_proj": 2, "self_attn.k_proj": 1}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a rank-4 adapter with alpha 6 on a tiny Llama with an untied head: a scaling of 1.5."""
    store = tmp_path_factory.mktemp("store")
    return random_adapter(llama, store, rank=4, alpha=6.0, targets=("all-linear", "lm_head"))


def _export(made: RandomAdapter, out: Path, **options: object) -> GGUFReader:
    ExportGguf(**options).emit(made.frozen, out, made.context)
    return GGUFReader(out / WEIGHTS_FILE)


def _module(name: str, layers: dict[str, str]) -> str:
    """Return the module path of a tensor of the base's GGUF file, by hand."""
    if name == "output.weight":
        return "lm_head"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{layers[kind]}"


def _numbers(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Return the tensors by their paths in PEFT, as numpy shapes them."""
    layers = PHI3_LAYERS if _fields(reader)["general.architecture"] == "phi3" else LAYERS
    found = {}
    for tensor in reader.tensors:
        name, _, role = tensor.name.rpartition(".")
        path = f"{_module(name, layers)}.{SUFFIXES[role]}.weight"
        found[path] = np.array(dequantize(tensor.data, tensor.tensor_type))
    return found


def _folded(made: RandomAdapter) -> dict[str, np.ndarray]:
    scaling = made.frozen.alpha / made.frozen.rank
    return {
        path: (tensor * scaling if ".lora_B." in path else tensor).numpy()
        for path, tensor in made.tensors.items()
    }


def _from_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo the reordering row by row: 2 i and 2 i + 1 of a head were i and i + head_size / 2."""
    head_size = len(rows) // n_heads
    undone = np.empty_like(rows)
    for head in range(n_heads):
        start = head * head_size
        for i in range(head_size // 2):
            undone[start + i] = rows[start + 2 * i]
            undone[start + head_size // 2 + i] = rows[start + 2 * i + 1]
    return undone


def _undone(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    undone = dict(found)
    for path in found:
        module = ".".join(path.split(".")[3:5])
        if ".lora_B." in path and module in N_HEADS:
            undone[path] = _from_pairs(found[path], N_HEADS[module])
    return undone


def _fields(reader: GGUFReader) -> dict[str, object]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_the_directory_holds_exactly_its_files(made, tmp_path):
    manifest = ExportGguf().emit(made.frozen, tmp_path / "out", made.context)
    files = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.*")}
    assert files == {"README.md", WEIGHTS_FILE, PROBE_FILE, MANIFEST_PATH}
    assert (tmp_path / "out" / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o644
    assert list(check_manifest(tmp_path / "out")) == []
    assert (manifest.format, manifest.rank, manifest.dtype) == ("gguf", 4, "float32")


def test_the_metadata_is_what_llama_cpp_asks_for(made, tmp_path):
    assert _fields(_export(made, tmp_path / "out")) == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }


def test_names_and_shapes_are_those_of_the_bases_file(made, tmp_path):
    shapes = {tensor.name: tensor.shape.tolist() for tensor in _export(made, tmp_path / "out").tensors}
    assert len(shapes) == len(made.tensors) == 30
    # ggml's order: the contiguous side first, so [in, r] and [r, out].
    assert shapes["blk.1.attn_k.weight.lora_a"] == [64, 4]
    assert shapes["blk.1.attn_k.weight.lora_b"] == [4, 32]
    assert shapes["blk.0.ffn_down.weight.lora_a"] == [96, 4]
    assert shapes["blk.0.ffn_down.weight.lora_b"] == [4, 64]
    assert shapes["output.weight.lora_b"] == [4, 272]


@pytest.mark.parametrize(
    ("base", "architecture"),
    [
        ("tiny_llama", "llama"),
        ("tiny_mistral", "llama"),
        ("tiny_qwen2", "qwen2"),
        ("tiny_qwen3", "qwen3"),
        ("tiny_gemma2", "gemma2"),
        ("tiny_gemma3", "gemma3"),
        ("tiny_phi3", "phi3"),
    ],
)
def test_every_number_is_the_adapters(base, architecture, tmp_path):
    made = random_adapter(
        getattr(tiny_models, base)(tmp_path / "base"), tmp_path / "store", rank=3, alpha=6.0
    )
    reader = _export(made, tmp_path / "out")
    assert _fields(reader)["general.architecture"] == architecture
    found, expected = _numbers(reader), _folded(made)
    undone = _undone(found) if architecture == "llama" else found
    assert undone.keys() == expected.keys()
    for path, numbers in expected.items():
        assert np.array_equal(undone[path], numbers), path


def test_only_rows_of_q_and_k_are_reordered(made, tmp_path):
    found, expected = _numbers(_export(made, tmp_path / "out")), _folded(made)
    moved = {path for path in found if not np.array_equal(found[path], expected[path])}
    assert moved == {
        f"model.layers.{i}.self_attn.{kind}.lora_B.weight" for i in (0, 1) for kind in ("q_proj", "k_proj")
    }


def _rotate(vector: np.ndarray, position: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rotate the pairs (first[i], second[i]) of a head by the rotary embedding's angles."""
    angles = position / 10_000 ** (np.arange(len(first)) / len(first))
    rotated = np.empty_like(vector)
    rotated[first] = vector[first] * np.cos(angles) - vector[second] * np.sin(angles)
    rotated[second] = vector[first] * np.sin(angles) + vector[second] * np.cos(angles)
    return rotated


def test_pairs_rotated_by_ggml_attend_as_halves_rotated_by_transformers():
    generator = np.random.default_rng(3)
    queries, keys = generator.normal(size=(2, 8, 5)), generator.normal(size=(8, 5))
    x, y = generator.normal(size=(2, 5))
    halves, pairs = (np.arange(4), np.arange(4, 8)), (np.arange(0, 8, 2), np.arange(1, 8, 2))
    reordered = rows_in_pairs(queries.reshape(16, 5), 2).reshape(2, 8, 5)
    for head in range(2):
        score = _rotate(queries[head] @ x, 7, *halves) @ _rotate(keys @ y, 2, *halves)
        again = _rotate(reordered[head] @ x, 7, *pairs) @ _rotate(rows_in_pairs(keys, 1) @ y, 2, *pairs)
        assert again == pytest.approx(score, rel=1e-12)
        assert _rotate(queries[head] @ x, 7, *pairs) @ _rotate(keys @ y, 2, *pairs) != pytest.approx(score)


@pytest.mark.parametrize(
    ("dtype", "kind", "file_type", "tolerance"),
    [
        ("float16", GGMLQuantizationType.F16, 1, 2.0**-11),
        ("bfloat16", GGMLQuantizationType.BF16, 32, 2.0**-8),
    ],
)
def test_another_type_is_one_rounding(made, tmp_path, dtype, kind, file_type, tolerance):
    reader = _export(made, tmp_path / "out", dtype=dtype)
    assert {tensor.tensor_type for tensor in reader.tensors} == {kind}
    assert _fields(reader)["general.file_type"] == file_type
    found, expected = _undone(_numbers(reader)), _folded(made)
    for path, numbers in expected.items():
        assert np.allclose(found[path], numbers, rtol=tolerance, atol=1e-7), path
    assert any(not np.array_equal(found[path], expected[path]) for path in found)


def test_the_same_adapter_gives_the_same_bytes(made, tmp_path):
    for out in (tmp_path / "one", tmp_path / "deeper" / "two"):
        ExportGguf(dtype="bfloat16").emit(made.frozen, out, made.context)
    for file in (file for file in (tmp_path / "one").rglob("*") if file.is_file()):
        other = tmp_path / "deeper" / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes(), file


def test_the_card_says_how_to_load_it(made, tmp_path):
    ExportGguf().emit(made.frozen, tmp_path / "out", made.context)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--lora path/to/this/directory/{WEIGHTS_FILE}" in card
    assert "rank-4 LoRA in float32" in card and "Nothing quantum is needed" in card


def test_a_moved_base_gives_the_same_export_and_another_is_refused(tmp_path):
    made = random_adapter(tiny_llama(tmp_path / "base"), tmp_path / "store")
    before = ExportGguf().emit(made.frozen, tmp_path / "before", made.context)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ModelError, match="no such directory"):
        ExportGguf().emit(made.frozen, tmp_path / "out", made.context)
    moved = ExportGguf(model=str(tmp_path / "moved"))
    assert moved.emit(made.frozen, tmp_path / "after", made.context) == before
    other = ExportGguf(model=str(tiny_qwen3(tmp_path / "qwen")))
    with pytest.raises(ModelError, match="another config"):
        other.emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def _with_base(made: RandomAdapter, **fields: object) -> FrozenAdapter:
    return made.frozen.model_copy(update={"base": made.frozen.base.model_copy(update=fields)})


def test_what_the_format_cannot_carry_is_refused(made, gpt2, tmp_path):
    conv1d = random_adapter(gpt2, tmp_path / "store")
    refused = (
        (conv1d.frozen, "Conv1D.*merged"),
        (_with_base(made, architecture="OPTForCausalLM"), "OPTForCausalLM; use `format` merged"),
        (_with_base(made, ties_lm_head=True), "tied to the input embedding"),
        (_with_base(made, architecture="GemmaForCausalLM", ties_lm_head=False), "lm_head.*gemma models"),
    )
    for frozen, words in refused:
        with pytest.raises(ExportError, match=words):
            ExportGguf().emit(frozen, tmp_path / "out", made.context)
    with pytest.raises(OptionError, match=r"^dtype: "):
        ExportGguf(dtype="int8").emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_not_adapted_is_no_obstacle(tmp_path):
    made = random_adapter(tiny_llama(tmp_path / "base", tied=True), tmp_path / "store", targets=("v_proj",))
    names = {tensor.name for tensor in _export(made, tmp_path / "out").tensors}
    assert names == {f"blk.{i}.attn_v.weight.lora_{role}" for i in (0, 1) for role in "ab"}


def test_the_manifest_reads_back(made, tmp_path):
    manifest = ExportGguf().emit(made.frozen, tmp_path / "out", made.context)
    read = Manifest.from_json((tmp_path / "out" / MANIFEST_PATH).read_bytes(), MANIFEST_PATH)
    assert read == manifest and read.provenance.parent == made.frozen.digest
    assert [option.name for option in read.provenance.options] == ["dtype"]


def test_verify_says_what_it_takes_to_ask_llama_cpp(made, tmp_path):
    manifest = ExportGguf().emit(made.frozen, tmp_path / "out", made.context)
    step = VerifyAdapter(directory=str(tmp_path / "out"), engines=("llama.cpp",))
    with pytest.raises(OptionError, match=r"^engines: .* found llama\.cpp; pass `python`"):
        step.run(manifest, made.context)
    with pytest.raises(OptionError, match=r"^base_gguf: expected a GGUF file of the base model"):
        replace(step, python=sys.executable).run(manifest, made.context)
    with pytest.raises(OptionError, match=r"^engines: expected llama\.cpp, found none that is installed"):
        replace(step, engines=None).run(manifest, made.context)
