"""The onnxruntime-genai exporter: what that engine generates, with and without the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpa.documents import MANIFEST_PATH, TensorRef, read_manifest
from qpa.errors import ExportError, OptionError, VerificationError
from qpa.exporters.contracts.export import check_contract
from qpa.exporters.formats.genai import CONFIG_FILE, ExportGenai, genai_config, genai_name
from qpa.exporters.onnx.files import ADAPTER_FILE
from qpa.models.base_model import load_model
from qpa.models.probe import N_NEW
from qpa.passes.verify_adapter import VerifyAdapter
from tests.random_adapter import RandomAdapter, random_adapter
from tests.test_export_onnx import (
    PROMPT,
    Engine,
    base_greedy,
    base_logits,
    difference,
    live_greedy,
    live_logits,
)
from tests.tiny_models import tiny_gpt2, tiny_llama

genai = pytest.importorskip("onnxruntime_genai")

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request, tmp_path_factory) -> tuple[RandomAdapter, Path]:
    """Return a rank-3 adapter with a scaling of 2, and its export."""
    path = tmp_path_factory.mktemp(request.param)
    made = random_adapter(MODELS[request.param](path / "model"), path / "store", rank=3, alpha=6.0)
    ExportGenai().emit(made.frozen, path / "out", made.context)
    return made, path / "out"


def _generate(model: Any, prompts: np.ndarray, adapters: Any = None) -> list[list[int]]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=prompts.shape[1] + N_NEW, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    if adapters is not None:
        generator.set_active_adapter(adapters, "adapter")
    generator.append_tokens(prompts.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    n_prompt = prompts.shape[1]
    return [generator.get_sequence(row)[n_prompt:].tolist() for row in range(len(prompts))]


def test_the_engine_generates_what_the_live_model_does(exported):
    made, out = exported
    model = genai.Model(str(out))
    adapters = genai.Adapters(model)
    adapters.load(str(out / ADAPTER_FILE), "adapter")
    prompts = torch.stack([PROMPT, PROMPT.flip(0)])
    live = [live_greedy(made, prompt) for prompt in prompts]
    base = [base_greedy(made, prompt) for prompt in prompts]
    assert live[0] != base[0] and not any(0 in tokens for tokens in live + base)
    assert _generate(model, prompts.numpy(), adapters) == live
    assert _generate(model, prompts.numpy()) == base


def test_the_graph_computes_the_same_numbers_in_onnxruntime(exported):
    made, out = exported
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(out / ADAPTER_FILE))
    session = Engine.open(out / "model.onnx").session
    assert difference(Engine(session, adapter).logits(PROMPT), live_logits(made)) <= 1e-4
    assert difference(Engine(session).logits(PROMPT), base_logits(made)) <= 1e-4


def test_tensors_are_named_and_laid_out_as_the_model_builder_does(exported):
    made, out = exported
    read = onnxruntime.AdapterFormat.read_adapter(str(out / ADAPTER_FILE))
    found = {name: value.numpy() for name, value in read.get_parameters().items()}
    assert found.keys() == {genai_name(tensor) for tensor in made.frozen.tensors}
    for ref in made.frozen.tensors:
        tensor = made.tensors[ref.path]
        expected = (tensor * 2.0 if ref.role == "lora_B" else tensor).T
        assert np.array_equal(found[genai_name(ref)], expected.numpy()), ref.path
    graph = onnx.load(out / "model.onnx").graph
    assert found.keys() <= {value.name for value in graph.input}
    assert found.keys() <= {value.name for value in graph.initializer}
    ref = TensorRef(module="model.layers.0.self_attn.q_proj", role="lora_A", shape=(1, 1))
    assert genai_name(ref) == "model.layers.0.attn.q_proj.lora_A.MatMul.weight"


def test_the_cards_program_runs(exported, capsys):
    made, out = exported
    program = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(program.replace("path/to/this/directory", str(out)), names)
    prompt = torch.from_numpy(names["prompt"].astype(np.int64))
    found = names["generator"].get_sequence(0)[len(prompt) :][:N_NEW].tolist()
    assert found == live_greedy(made, prompt)[: len(found)] and len(found) > 3
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_the_files_are_those_of_the_manifest(exported):
    _, out = exported
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {entry.file for entry in read_manifest(out).files} | {MANIFEST_PATH}
    assert {CONFIG_FILE, ADAPTER_FILE, "model.onnx", "tokenizer.json", "README.md"} < files


@pytest.mark.parametrize("exported", ["gpt2"], indirect=True)
def test_the_same_adapter_gives_the_same_bytes_from_another_place(exported, tmp_path):
    made, out = exported
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(made.frozen.base.name_or_path, moved)
    ExportGenai(model=str(moved)).emit(made.frozen, other, made.context)
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (other / path.relative_to(out)).read_bytes(), path


def test_a_list_of_ends_is_kept_and_no_end_is_refused(exported):
    made, out = exported
    model = load_model(made.frozen.base, keep_dtype=False)
    inputs = onnx.load(out / "model.onnx").graph.input
    values = [
        _Value(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in inputs
    ]
    assert json.loads((out / CONFIG_FILE).read_text()) == genai_config(model, values)
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = [5, 0], None
    model.config.bos_token_id = None
    content = genai_config(model, values)["model"]
    assert (content["eos_token_id"], content["bos_token_id"]) == ([5, 0], 5)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ExportError, match=r"expected an end-of-text token .*; use `format` onnx-adapter"):
        genai_config(model, values)
    with pytest.raises(ExportError, match="one number and size of key heads"):
        genai_config(model, [*values, _Value("past_key_values.2.key", ["batch_size", 7, "past_length", 32])])


class _Value:
    def __init__(self, name: str, shape: list[Any]) -> None:
        self.name, self.shape = name, shape


def test_another_type_is_refused(exported, tmp_path):
    made, _ = exported
    with pytest.raises(OptionError, match=r"^dtype: expected float32 with `format` genai"):
        ExportGenai(dtype="float16").emit(made.frozen, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("in_process")
def test_verify_asks_onnxruntime_genai(exported):
    made, out = exported
    (check,) = VerifyAdapter(directory=str(out)).run(read_manifest(out), made.context).engines
    assert check.engine == "onnxruntime-genai" and check.greedy_tokens_equal
    assert check.max_logit_difference < 1e-4 < 0.1 < check.max_base_difference


@pytest.mark.parametrize("name", ["custom_ops_library", "ep_library"])
def test_a_config_that_names_a_library_is_never_loaded(exported, tmp_path, monkeypatch, name):
    made, out = exported
    hostile = tmp_path / "hostile"
    shutil.copytree(out, hostile)
    config = json.loads((hostile / CONFIG_FILE).read_text())
    config["model"]["decoder"]["session_options"][name] = "evil.so"
    (hostile / CONFIG_FILE).write_text(json.dumps(config))
    monkeypatch.setattr(
        "qpa.exporters.contracts.export.check_manifest", lambda _: ()
    )  # its author forged that
    assert [finding.rule for finding in check_contract(hostile)] == ["L22"]
    with pytest.raises(VerificationError, match="L22"):
        VerifyAdapter(directory=str(hostile)).run(read_manifest(hostile), made.context)
    config["model"]["decoder"]["session_options"].pop(name)
    (hostile / CONFIG_FILE).write_text(json.dumps(config | {"model": config["model"] | {"vision": {}}}))
    assert [finding.rule for finding in check_contract(hostile)] == ["L22"]
