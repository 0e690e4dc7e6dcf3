"""The ONNX adapter exporter: one session, many adapters, as onnxruntime runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from qpa.documents import MANIFEST_PATH, EngineCheck, read_manifest
from qpa.errors import ExportError, OptionError, VerificationError
from qpa.exporters.formats.onnx_adapter import ExportOnnxAdapter
from qpa.exporters.onnx import base_graph, graph
from qpa.exporters.onnx.base_graph import SUMS_FILE, base_graph_digest
from qpa.exporters.onnx.files import ADAPTER_FILE, write_adapter
from qpa.models.base_model import load_model
from qpa.models.probe import N_NEW
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.store.atomic_files import TEMPORARY_PREFIX
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
from tests.tiny_models import tiny_llama


def _adapter(path: Path) -> Any:
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    return adapter


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def three(llama: Path, store: Path) -> RandomAdapter:
    """Return a rank-3 adapter with a scaling of 2."""
    return random_adapter(llama, store / "three", rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def eight(llama: Path, store: Path) -> RandomAdapter:
    return random_adapter(llama, store / "eight", rank=8, seed=1)


@pytest.fixture(scope="module")
def exported(three: RandomAdapter, store: Path) -> Path:
    """Return the export of `three`, which fills the directory of base graphs."""
    ExportOnnxAdapter(base_graph=str(store / "graphs")).emit(three.frozen, store / "out3", three.context)
    return store / "out3"


@pytest.fixture(scope="module")
def second(eight: RandomAdapter, exported: Path, store: Path) -> Path:
    """Return the export of `eight`, for which tracing is forbidden."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(graph, "trace_causal_lm")
        ExportOnnxAdapter(base_graph=str(store / "graphs")).emit(eight.frozen, store / "out8", eight.context)
    return store / "out8"


def test_without_an_adapter_the_graph_is_the_base_model(exported, three):
    engine = Engine.open(exported / "base" / "model.onnx")
    assert difference(engine.logits(PROMPT), base_logits(three)) <= 1e-4
    assert engine.greedy(PROMPT) == base_greedy(three)


def test_adapters_of_two_ranks_take_turns_in_one_session(exported, second, three, eight):
    session = Engine.open(exported / "base" / "model.onnx").session
    turns = [(exported, three), (second, eight), (exported, three)]
    for out, made in turns:
        engine = Engine(session, _adapter(out / ADAPTER_FILE))
        assert difference(engine.logits(PROMPT), live_logits(made)) <= 1e-4
        assert engine.greedy(PROMPT) == live_greedy(made)
    assert difference(Engine(session).logits(PROMPT), base_logits(three)) <= 1e-4
    assert (
        len({tuple(tokens) for tokens in (live_greedy(three), live_greedy(eight), base_greedy(three))}) == 3
    )


def test_a_second_export_takes_the_kept_graph(exported, second, store):
    (kept,) = (store / "graphs").iterdir()
    assert {path.name for path in kept.iterdir()} == {"model.onnx", SUMS_FILE}
    inodes = {(path / "model.onnx").stat().st_ino for path in (kept, exported / "base", second / "base")}
    assert len(inodes) == 1
    sums = [{entry.file: entry.sha256 for entry in read_manifest(out).files} for out in (exported, second)]
    assert sums[0]["base/model.onnx"] == sums[1]["base/model.onnx"]
    assert sums[0][ADAPTER_FILE] != sums[1][ADAPTER_FILE]


def test_keeping_a_graph_removes_what_a_killed_export_left_of_one(tmp_path, monkeypatch):
    def write_graph(graph: bytes, path: Path) -> list[str]:
        path.write_bytes(graph)
        return [path.name]

    monkeypatch.setattr(base_graph, "write_graph", write_graph)
    (tmp_path / f"{TEMPORARY_PREFIX}killed").mkdir()
    base_graph._keep(b"graph", tmp_path / "kept")
    base_graph._keep(b"another process's", tmp_path / "kept")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]
    assert (tmp_path / "kept" / "model.onnx").read_bytes() == b"graph"


def test_with_and_without_kept_graphs_the_bytes_are_the_same(exported, three, llama, tmp_path):
    moved, out = tmp_path / "moved", tmp_path / "deeper" / "out"
    shutil.copytree(llama, moved)
    ExportOnnxAdapter(model=str(moved)).emit(three.frozen, out, three.context)
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    assert files >= {Path(MANIFEST_PATH), Path(ADAPTER_FILE), Path("base/tokenizer.json")}
    for name in files:
        assert (out / name).read_bytes() == (exported / name).read_bytes(), name
    content = (out / "base" / "model.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content and str(tmp_path).encode() not in content


OTHER_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from qpa.exporters.onnx.files import write_adapter
names = ["b.lora_A.weight", "a.lora_B.weight", "a.lora_A.weight", "b.lora_B.weight"]
write_adapter({name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}, Path(sys.argv[1]))
"""


def test_an_adapter_file_is_the_same_from_every_process(tmp_path):
    names = ["a.lora_A.weight", "a.lora_B.weight", "b.lora_A.weight", "b.lora_B.weight"]
    values = dict(zip(names, (2, 1, 0, 3), strict=True))
    write_adapter(
        {name: np.full((2, 3), value, np.float32) for name, value in values.items()}, tmp_path / "one"
    )
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "other")]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_adapter_file_holds_every_number(exported, three):
    read = onnxruntime.AdapterFormat.read_adapter(str(exported / ADAPTER_FILE))
    assert (read.get_adapter_version(), read.get_model_version()) == (1, 1)
    found = {name: value.numpy() for name, value in read.get_parameters().items()}
    assert found.keys() == three.tensors.keys()
    for path, tensor in three.tensors.items():
        expected = tensor * 2.0 if path.endswith(".lora_B.weight") else tensor
        assert np.array_equal(found[path], expected.numpy()), path


def test_the_cards_program_runs(exported, three):
    program = (exported / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(program.replace("path/to/this/directory", str(exported)), names)
    prompt = torch.tensor(AutoTokenizer.from_pretrained(exported / "base")("Once upon a time")["input_ids"])
    assert names["tokens"][0, : len(prompt) + N_NEW].tolist() == [
        *prompt.tolist(),
        *live_greedy(three, prompt),
    ]


def test_conv1d_layers_take_adapters_too(gpt2, tmp_path):
    made = random_adapter(gpt2, tmp_path / "store", rank=3)
    ExportOnnxAdapter().emit(made.frozen, tmp_path / "out", made.context)
    session = Engine.open(tmp_path / "out" / "base" / "model.onnx").session
    engine = Engine(session, _adapter(tmp_path / "out" / ADAPTER_FILE))
    assert difference(engine.logits(PROMPT), live_logits(made)) <= 1e-4
    assert engine.greedy(PROMPT) == live_greedy(made) != Engine(session).greedy(PROMPT) == base_greedy(made)


def test_other_weights_modules_and_versions_get_a_graph_of_their_own(three, llama, tmp_path, monkeypatch):
    model = load_model(three.frozen.base, keep_dtype=False)
    digest = base_graph_digest(three.frozen, model)
    assert base_graph_digest(three.frozen.model_copy(update={"rank": 5}), model) == digest
    fewer = three.frozen.model_copy(update={"tensors": three.frozen.tensors[:2]})
    assert base_graph_digest(fewer, model) != digest
    moved = three.frozen.base.model_copy(update={"name_or_path": str(tiny_llama(tmp_path / "other", seed=1))})
    assert moved.config_digest == three.frozen.base.config_digest
    assert base_graph_digest(three.frozen, load_model(moved, keep_dtype=False)) != digest
    monkeypatch.setattr(base_graph, "OPSET", 18)
    assert base_graph_digest(three.frozen, model) != digest


@pytest.mark.parametrize("damage", ["edited", "missing"])
def test_a_kept_graph_that_was_changed_is_refused(exported, three, store, tmp_path, damage):
    shutil.copytree(store / "graphs", tmp_path / "graphs")
    (kept,) = (tmp_path / "graphs").iterdir()
    if damage == "edited":
        (kept / "model.onnx").write_bytes((kept / "model.onnx").read_bytes()[:-1] + b"?")
    else:
        (kept / SUMS_FILE).unlink()
    exporter = ExportOnnxAdapter(base_graph=str(tmp_path / "graphs"))
    with pytest.raises(ExportError, match=r"the base graph that was written here.*delete the directory"):
        exporter.emit(three.frozen, tmp_path / "out", three.context)
    assert not (tmp_path / "out").exists()


def test_where_files_cannot_be_linked_they_are_copied(exported, three, store, tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    exporter = ExportOnnxAdapter(base_graph=str(store / "graphs"))
    exporter.emit(three.frozen, tmp_path / "out", three.context)
    assert (tmp_path / "out" / "base" / "model.onnx").stat().st_nlink == 1
    for entry in read_manifest(exported).files:
        assert (tmp_path / "out" / entry.file).read_bytes() == (exported / entry.file).read_bytes()


def test_another_type_is_refused(three, tmp_path):
    with pytest.raises(OptionError, match=r"^dtype: expected float32 with `format` onnx-adapter"):
        ExportOnnxAdapter(dtype="float16").emit(three.frozen, tmp_path / "out", three.context)
    assert list(tmp_path.iterdir()) == []


def _verify(out: Path, made: RandomAdapter) -> EngineCheck:
    return VerifyAdapter(directory=str(out)).run(read_manifest(out), made.context).engines[0]


@pytest.mark.usefixtures("in_process")
def test_verify_asks_onnxruntime_with_the_adapter_active(exported, three, second, tmp_path, monkeypatch):
    check = _verify(exported, three)
    assert check.engine == "onnxruntime" and check.greedy_tokens_equal
    assert check.max_logit_difference < 1e-4 < 0.1 < check.max_base_difference
    swapped = tmp_path / "swapped"
    shutil.copytree(exported, swapped)
    shutil.copy(second / ADAPTER_FILE, swapped)
    with pytest.raises(VerificationError, match=f"L20 {ADAPTER_FILE}"):
        _verify(swapped, three)
    monkeypatch.setattr(ExportOnnxAdapter, "findings", lambda *_: ())
    with pytest.raises(VerificationError, match="a difference of"):
        _verify(swapped, three)
    write_adapter({"other.lora_A.weight": np.ones((3, 64), np.float32)}, swapped / ADAPTER_FILE)
    with pytest.raises(Exception, match=r"missing|other\.lora_A|Invalid"):
        _verify(swapped, three)
