"""What is exported of other kinds of adapters than LoRA, and what PEFT and engines read of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.adapters.registry import KINDS
from qpa.documents import MANIFEST_PATH, TENSOR_RULES, AdapterSpec, FrozenAdapter, read_manifest
from qpa.documents.manifest import FORMATS
from qpa.errors import DocumentError, ExportError
from qpa.exporters.contracts.export import check_contract
from qpa.exporters.contracts.lora import CONFIG_FILE, WEIGHTS_FILE
from qpa.exporters.formats.merged import ExportMerged
from qpa.exporters.formats.onnx import ExportOnnx
from qpa.exporters.formats.peft import ExportPeft
from qpa.exporters.onnx.adapted_model import put_adapter
from qpa.exporters.onnx.format import formats_without_graph
from qpa.exporters.registry import exporter_for, formats_for
from qpa.models.base_model import load_model
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.store.atomic_files import sha256_of
from tests.random_adapter import RandomAdapter, random_adapter
from tests.test_documents import GOLDEN, seal
from tests.test_export_onnx import PROMPT, Engine, difference, live_greedy, live_logits
from tests.tiny_architectures import MORE_ARCHITECTURES
from tests.tiny_models import ARCHITECTURES

# peft asks transformers by a name that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
]

METHODS = ("dora", "ia3", "prefix", "ffa", "cayley", "qtha")
IN_PEFT = ("dora", "ia3", "prefix")
MODELS = ("llama", "gpt2", "opt")
"""Linear layers without biases, Conv1D with biases, and Linear layers with biases."""

AdapterOf = Callable[[str, str], RandomAdapter]


def write_model(name: str, path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model whose biases are not zero."""
    ARCHITECTURES[name](path)
    model, random = AutoModelForCausalLM.from_pretrained(path), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory: pytest.TempPathFactory) -> AdapterOf:
    """Return the function from a model and a method to a random adapter, made once. DoRA's scaling is 2."""
    model_of = cache(lambda name: write_model(name, tmp_path_factory.mktemp("models") / name))

    @cache
    def get(name: str, method: str) -> RandomAdapter:
        store, alpha = tmp_path_factory.mktemp("store"), 6.0 if method == "dora" else None
        rank = 4 if method == "cayley" else 3
        return random_adapter(model_of(name), store, method=method, rank=rank, alpha=alpha)

    return get


def base_of(made: RandomAdapter) -> Any:
    return load_model(made.frozen.base, keep_dtype=False)


def with_arrays(made: RandomAdapter, tensors: dict[str, torch.Tensor]) -> FrozenAdapter:
    """Return a frozen adapter with other numbers."""
    arrays = made.context.files.put("{sha256}.safetensors", save(tensors))
    return made.frozen.model_copy(update={"arrays": arrays})


# Merged weights


def merged_by_peft(made: RandomAdapter) -> dict[str, torch.Tensor]:
    return copy.deepcopy(made.live).merge_and_unload().state_dict()


@pytest.mark.parametrize("block", [1 << 18, 7 * 64])
@pytest.mark.parametrize("method", ["dora", "ia3"])
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_is_what_peft_merges(adapter_of, tmp_path, monkeypatch, name, method, block):
    made = adapter_of(name, method)
    monkeypatch.setattr("qpa.exporters.formats.merged._BLOCK", block)
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    found, base = merged.state_dict(), base_of(made).state_dict()
    for key, expected in merged_by_peft(made).items():
        torch.testing.assert_close(found[key], expected, atol=1e-6, rtol=1e-5, msg=key)
    changed = {key.rpartition(".")[0] for key in found if not torch.equal(found[key], base[key])}
    assert changed == {*made.frozen.modules}
    with torch.no_grad():
        assert difference(merged(input_ids=PROMPT[None]).logits[0], live_logits(made)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_scales_of_outputs_scale_biases_and_those_of_inputs_do_not(adapter_of, tmp_path, name):
    made = adapter_of(name, "ia3")
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = base_of(made).state_dict()
    for module in made.frozen.modules:
        scale, bias = made.tensors[f"{module}.ia3_l"], base[f"{module}.bias"]
        assert bool(bias.any())
        assert torch.equal(found[f"{module}.bias"], bias * scale.ravel() if scale.shape[1] == 1 else bias)
    assert {made.tensors[f"{module}.ia3_l"].shape[0] == 1 for module in made.frozen.modules} == {True, False}


def test_dora_on_a_bfloat16_base_is_rounded_once(tmp_path):
    base = write_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    made = random_adapter(base, tmp_path / "store", method="dora", rank=3, alpha=6.0)
    ExportMerged(dtype="bfloat16").emit(made.frozen, tmp_path / "out", made.context)
    found, stored = (load_file(path / "model.safetensors") for path in (tmp_path / "out", base))
    assert {tensor.dtype for tensor in (*found.values(), *stored.values())} == {torch.bfloat16}
    for module in made.frozen.modules:
        roles = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        a, b, magnitude = (made.tensors[f"{module}.{role}"].double() for role in roles)
        total = stored[f"{module}.weight"].double() + 2 * b @ a
        exact = magnitude * total / total.norm(dim=1, keepdim=True)
        error = (found[f"{module}.weight"].double() - exact).abs()
        assert bool((error <= exact.abs() * 2.0**-8 + 1e-6).all()), module


@pytest.mark.parametrize("method", ["dora", "ia3", "ffa", "cayley", "qtha"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_onnx_traces_is_the_live_model(adapter_of, name, method):
    made = adapter_of(name, method)
    model = base_of(made)
    put_adapter(model, FrozenArrays.open(made.frozen, made.context))
    assert difference(model(input_ids=PROMPT[None]).logits[0], live_logits(made)) <= 1e-5


# The format of PEFT


def export(made: RandomAdapter, out: Path, **options: Any) -> Path:
    ExportPeft(**options).emit(made.frozen, out, made.context)
    return out


@pytest.mark.parametrize("method", IN_PEFT)
@pytest.mark.parametrize("name", [*MODELS, "gemma3", "phi3"])
@torch.no_grad()
def test_peft_loads_the_live_model_and_would_have_written_the_same(adapter_of, tmp_path, name, method):
    made = adapter_of(name, method)
    out = export(made, tmp_path / "out")
    loaded = PeftModel.from_pretrained(base_of(made), out).eval()
    assert torch.equal(loaded(input_ids=PROMPT[None]).logits[0], live_logits(made))
    made.live.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(path / WEIGHTS_FILE) for path in (out, tmp_path / "theirs"))
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], 2 * tensor if ".lora_B." in key else tensor), key
    ours, theirs = (PeftConfig.from_pretrained(path) for path in (out, tmp_path / "theirs"))
    expected = theirs.to_dict() | ({"lora_alpha": theirs.r} if method == "dora" else {})
    differing = {key for key, value in ours.to_dict().items() if value != expected[key]}
    # PEFT asks the base model for two of them; the third is of a projection that is not there.
    assert differing <= {"token_dim", "num_attention_heads", "encoder_hidden_size"}


@pytest.mark.parametrize("method", IN_PEFT)
def test_the_same_adapter_gives_the_same_bytes_and_a_card_that_runs(adapter_of, tmp_path, method):
    made = adapter_of("opt", method)
    first, second = export(made, tmp_path / "first"), export(made, tmp_path / "deeper" / "second")
    assert check_contract(first) == ()
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert {Path(CONFIG_FILE), Path(WEIGHTS_FILE), Path(MANIFEST_PATH), Path("README.md")} < files
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    program = (first / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(program.replace("path/to/this/directory", str(first)), names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(input_ids=PROMPT[None]).logits[0], live_logits(made))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", IN_PEFT)
def test_every_type_is_written_and_verified(adapter_of, tmp_path, method, dtype):
    made = adapter_of("opt", method)
    out = export(made, tmp_path / "out", dtype=dtype)
    manifest = read_manifest(out)
    assert (manifest.format, manifest.method, manifest.dtype) == ("peft", method, dtype)
    for key, tensor in load_file(out / WEIGHTS_FILE).items():
        assert tensor.dtype == getattr(torch, dtype) and tensor.is_contiguous(), key
    (check,) = VerifyAdapter(directory=str(out)).run(manifest, made.context).engines
    assert (check.engine, check.missing_keys, check.unexpected_keys) == ("peft", (), ())
    assert (check.max_logit_difference == 0.0) is (dtype == "float32")


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].is_file])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_refused(adapter_of, tmp_path, method, name):
    """Where the format has the method at all, every tensor is read."""
    made = adapter_of("llama", method)
    for wrong in (float("nan"), float("inf")):
        path = [*made.tensors][-1]
        tensors = made.tensors | {path: torch.full_like(made.tensors[path], wrong)}
        expected = f"^{path}: expected finite" if name in formats_for(method) else f"^`format` {name}: "
        with pytest.raises(ExportError, match=expected) as caught:
            exporter_for(name, {}).emit(with_arrays(made, tensors), tmp_path / "out", made.context)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_the_type_are_refused(adapter_of, tmp_path):
    made = adapter_of("llama", "prefix")
    large = with_arrays(made, {path: tensor + 7e4 for path, tensor in made.tensors.items()})
    with pytest.raises(ExportError, match="expected finite float16 numbers, found one too large"):
        ExportPeft(dtype="float16").emit(large, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_format_that_cannot_carry_a_method_names_those_that_can(adapter_of, tmp_path, method):
    made, carried = adapter_of("llama", method), formats_for(method)
    refused = [name for name in FORMATS if name not in carried]
    assert {"lora", "onnx-adapter", "genai", "gguf", "mlx"} <= {*refused} and "onnx" in carried
    for name in refused:
        with pytest.raises(ExportError, match=f"^`format` {name}: expected ") as caught:
            exporter_for(name, {}).emit(made.frozen, tmp_path / "out", made.context)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
        assert all(other in str(caught.value).rpartition("; use ")[2] for other in carried)


def test_the_peft_format_is_not_for_lora(adapter_of, tmp_path):
    words = (
        "^`format` peft: expected DoRA, IA3, prefix tuning, Cayley or shared Cayley, found LoRA; use lora, "
    )
    with pytest.raises(ExportError, match=words):
        export(adapter_of("llama", "lora"), tmp_path / "out")


# Contract L23


def sealed(out: Path) -> Path:
    """Let the manifest have the digests that the files have now."""
    manifest = read_manifest(out)
    files = tuple(
        entry.model_copy(update={"sha256": sha256_of(file), "n_bytes": file.stat().st_size})
        for entry in manifest.files
        for file in [out / entry.file]
    )
    (out / MANIFEST_PATH).write_bytes(manifest.model_copy(update={"files": files}).to_json())
    return out


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("dora", {"use_dora": False}),
        ("dora", {"peft_type": "IA3"}),
        ("ia3", {"peft_type": "LORA", "use_dora": True}),
        ("prefix", {"peft_type": ["PREFIX_TUNING"]}),
        ("dora", {"use_rslora": True}),
        ("dora", {"lora_alpha": 64}),
        ("dora", {"init_lora_weights": "pissa"}),
        ("dora", {"rank_pattern": {"q_proj": 1}}),
        ("dora", {"target_modules": ".*"}),
        ("ia3", {"modules_to_save": ["lm_head"]}),
        ("prefix", {"prefix_projection": True}),
        ("cayley", {"use_cayley_neumann": True}),
        ("cayley", {"block_share": True}),
    ],
)
def test_a_config_of_another_method_is_found(adapter_of, tmp_path, method, change):
    out = export(adapter_of("llama", method), tmp_path / "out")
    file = out / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    assert {finding.rule for finding in check_contract(out)} == {"L20", "L23"}
    found = check_contract(sealed(out))
    assert {finding.rule for finding in found} == {"L23"}
    assert all(finding.subject.startswith(CONFIG_FILE) and "\n" not in str(finding) for finding in found)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("dora", {"target_modules": ["q_proj"]}),
        ("dora", {"r": 5, "lora_alpha": 5}),
        ("ia3", {"feedforward_modules": []}),
        ("ia3", {"target_modules": ["k_proj"]}),
        ("prefix", {"num_virtual_tokens": 2}),
        ("prefix", {"num_layers": 3}),
        ("cayley", {"oft_block_size": 8}),
        ("cayley", {"target_modules": ["q_proj"]}),
    ],
)
def test_a_config_that_its_tensors_do_not_keep_is_found(adapter_of, tmp_path, method, change):
    out = export(adapter_of("llama", method), tmp_path / "out")
    file = out / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    found = check_contract(sealed(out))
    assert found and {finding.rule for finding in found} == {"L24"}


@pytest.mark.parametrize("method", ["dora", "ia3", "prefix", "cayley"])
def test_other_tensors_are_found(adapter_of, tmp_path, method):
    out = export(adapter_of("llama", method), tmp_path / "out")
    save_file({"nonsense": torch.zeros(3)}, out / WEIGHTS_FILE, {"format": "pt"})
    (out / WEIGHTS_FILE).chmod(0o644)
    found = check_contract(sealed(out))
    assert found and {finding.rule for finding in found} == {"L24"}


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_cannot_be_read_is_found_by_its_name(adapter_of, tmp_path, name):
    out = export(adapter_of("llama", "ia3"), tmp_path / "out")
    (out / name).write_bytes(b"[" * 100_000)
    assert name in [finding.subject for finding in check_contract(sealed(out))]


def test_a_number_that_is_not_finite_is_found(adapter_of, tmp_path):
    out = export(adapter_of("llama", "ia3"), tmp_path / "out")
    tensors = load_file(out / WEIGHTS_FILE)
    key = sorted(tensors)[1]
    tensors[key][0, 0] = float("nan")
    save_file(tensors, out / WEIGHTS_FILE, {"format": "pt"})
    (out / WEIGHTS_FILE).chmod(0o644)
    (finding,) = check_contract(sealed(out))
    assert finding.rule == "L25" and finding.subject == key


# ONNX


@pytest.fixture(
    scope="module",
    params=[("llama", "prefix"), ("opt", "prefix"), ("gpt2", "ffa"), ("llama", "qtha")],
    ids="-".join,
)
def graph(request, adapter_of, tmp_path_factory) -> tuple[RandomAdapter, Path]:
    """Return an adapter and its graph."""
    made, out = adapter_of(*request.param), tmp_path_factory.mktemp("onnx") / "out"
    ExportOnnx().emit(made.frozen, out, made.context)
    return made, out


def test_a_growing_cache_gives_what_the_live_model_gives(graph):
    """Two rows, one of them with padding: the prompt after an empty past, then one token at a time."""
    made, out = graph
    engine = Engine.open(out / "model.onnx")
    rows, mask = np.stack([PROMPT.numpy()[:9], PROMPT.numpy()[5:14]]), np.ones((2, 9), np.int64)
    mask[1, :3] = 0
    texts = [torch.from_numpy(rows[0]), torch.from_numpy(rows[1, 3:])]
    logits, past = engine.step(rows, engine.empty_past(2), mask)
    for n_seen in range(9, 14):
        assert {states.shape[2] for states in past} == {n_seen}
        for row, text in enumerate(texts):
            expected = live_logits(made, text)[-logits.shape[1] :]
            assert difference(torch.from_numpy(logits[row, -len(expected) :]), expected) <= 1e-4
        new = logits[:, -1:].argmax(axis=-1)
        texts = [torch.cat((text, torch.from_numpy(token))) for text, token in zip(texts, new, strict=True)]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        logits, past = engine.step(new, past, mask)


@pytest.mark.usefixtures("in_process")
def test_onnxruntime_answers_as_the_live_model_does(graph):
    made, out = graph
    assert check_contract(out) == ()
    engine = Engine.open(out / "model.onnx")
    assert engine.greedy(PROMPT) == live_greedy(made)
    (check,) = VerifyAdapter(directory=str(out)).run(read_manifest(out), made.context).engines
    assert check.engine == "onnxruntime" and check.greedy_tokens_equal
    assert check.max_logit_difference < 1e-4 < 1e-2 < check.max_base_difference


# Specs of any origin

ROLES_OF = {name: [role.name for role in TENSOR_RULES[name].roles] for name in TENSOR_RULES}
TENSOR_FIELD = st.one_of(
    st.tuples(st.just("module"), st.sampled_from(["layers.0", "layers.1", "h.0.mlp", ""])),
    st.tuples(st.just("role"), st.sampled_from([role for roles in ROLES_OF.values() for role in roles])),
    st.tuples(st.just("initial"), st.sampled_from(["zeros", "ones", "base", "random"])),
    st.tuples(st.just("shape"), st.lists(st.integers(-1, 9), min_size=2, max_size=3)),
)
SPEC_FIELD = st.one_of(
    st.tuples(st.just("method"), st.sampled_from([*ROLES_OF, "tarot"])),
    st.tuples(st.just("rank"), st.integers(-1, 9)),
)


@pytest.mark.parametrize("method", ["llama", *METHODS])
@given(
    fields=st.lists(SPEC_FIELD, max_size=2),
    changes=st.lists(st.tuples(st.integers(0, 9), TENSOR_FIELD), max_size=3),
    order=st.none() | st.lists(st.integers(0, 9), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_a_changed_spec_is_refused_or_as_good_as_any(method, fields, changes, order):
    """Fields of the spec and of some tensors change, and tensors come in another order, or twice."""
    content = json.loads(
        (GOLDEN / f"adapter-spec-{AdapterSpec.schema_version()}" / f"{method}.json").read_bytes()
    ) | dict(fields)
    n_tensors = len(content["tensors"])
    for place, field in changes:
        content["tensors"][place % n_tensors] |= dict([field])
    if order is not None:
        content["tensors"] = [content["tensors"][place % n_tensors] for place in order]
    try:
        spec = AdapterSpec.from_json(seal(content), "file")
    except DocumentError as error:
        assert error.subject == "file" and "\n" not in str(error)
        return
    assert AdapterSpec.from_json(spec.to_json(), "file") == spec
    n_modules = len(spec.tensors) // len(ROLES_OF[spec.method])
    assert [tensor.role for tensor in spec.tensors] == [*ROLES_OF[spec.method]] * n_modules
    assert len({tensor.path for tensor in spec.tensors}) == len(spec.tensors) >= spec.n_layers >= 1
    assert len(spec.pairs) == (n_modules if spec.method in ("lora", "dora") else 0)
    assert spec.n_numbers == sum(tensor.shape[0] * tensor.shape[1] for tensor in spec.tensors) >= 1


# Heads that share their weight, and layers of two sorts in one adapter


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_a_tied_head_is_refused_unless_allowed(gpt2, tmp_path, method):
    made = random_adapter(gpt2, tmp_path / "store", method=method, targets=("c_attn", "lm_head"))
    with pytest.raises(ExportError, match="embedding and output head share"):
        ExportPeft().emit(made.frozen, tmp_path / "out", made.context)
    manifest = ExportPeft(allow_tied_head=True).emit(made.frozen, tmp_path / "out", made.context)
    VerifyAdapter(directory=str(tmp_path / "out")).run(manifest, made.context)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "cayley"])
def test_a_graph_has_conv1d_and_linear_layers_in_one_adapter(gpt2, tmp_path, method):
    made = random_adapter(gpt2, tmp_path / "store", method=method, targets=("c_attn", "lm_head"))
    model = load_model(made.frozen.base, keep_dtype=False)
    put_adapter(model, FrozenArrays.open(made.frozen, made.context))
    ids = torch.arange(20)[None] + 40
    assert torch.allclose(model(input_ids=ids).logits, made.live(input_ids=ids).logits, atol=1e-5)


# Base models without a graph


@pytest.mark.parametrize(
    ("method", "advice"),
    [("lora", "; use `format` lora or merged"), ("dora", "; use `format` peft or merged"), ("qtha", "")],
)
def test_where_a_base_has_no_graph_a_format_that_carries_the_kind_is_named(
    tmp_path: Path, method: str, advice: str
) -> None:
    model = MORE_ARCHITECTURES["lfm2"](tmp_path / "model")
    made = random_adapter(model, tmp_path / "store", method=method, rank=2)
    with pytest.raises(ExportError) as caught:
        ExportOnnx().emit(made.frozen, tmp_path / "out", made.context)
    expected = "Lfm2ForCausalLM: expected a model whose cache is keys and values in every layer, found "
    assert str(caught.value) == f"{expected}DynamicCache{advice}"


@pytest.mark.parametrize("method", tuple(KINDS))
def test_formats_without_a_graph_carry_the_kind(method: str) -> None:
    found = formats_without_graph(method)
    assert found == tuple(name for name in ("lora", "peft", "merged") if name in formats_for(method))


@pytest.mark.parametrize(("method", "format_"), [("lora", "lora"), ("dora", "peft")])
def test_a_tied_head_leads_to_a_format_that_carries_the_kind(
    tmp_path: Path, method: str, format_: str
) -> None:
    model = ARCHITECTURES["llama-tied"](tmp_path / "model")
    made = random_adapter(model, tmp_path / "store", method=method, rank=2, targets=("lm_head",))
    with pytest.raises(ExportError, match=f"or use `format` {format_} `allow_tied_head`$"):
        ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
