"""A compact adapter on a model of transformers, by PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import qpa.serve
from benchmarks.random_compact import LLAMA, layers, write_adapters, write_basis, write_layout
from qpa.errors import DocumentError, OptionError
from qpa.serve.basis import Basis
from qpa.serve.expansion import tensors


@pytest.fixture
def basis(tmp_path: Path, llama: Path) -> Basis:
    return write_basis(tmp_path / "basis", layers(LLAMA, 2), base=str(llama))


@pytest.fixture
def files(tmp_path: Path, basis: Basis) -> list[Path]:
    store = tmp_path / "store"
    return write_adapters(store, ["a", "b"], basis, write_layout(store, basis))


def test_an_adapter_is_loaded_with_every_tensor(llama, files, basis):
    model = qpa.serve.load(
        AutoModelForCausalLM.from_pretrained(llama), str(files[0]), basis=str(basis.directory)
    )
    assert isinstance(model, PeftModel)
    found = model.state_dict()
    expected = dict(tensors(files[0], basis))
    assert len(expected) == 28
    for key, array in expected.items():
        loaded = found[key.replace(".weight", ".default.weight")]
        assert torch.equal(loaded, torch.from_numpy(array)) and loaded.abs().max() > 0


def test_the_environment_names_the_basis(llama, files, basis, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(llama)
    monkeypatch.delenv("QPA_BASIS", raising=False)
    with pytest.raises(OptionError, match="basis: expected a directory that qpa basis wrote, here or in"):
        qpa.serve.load(model, files[0])
    monkeypatch.setenv("QPA_BASIS", "")
    with pytest.raises(OptionError, match="here or in QPA_BASIS"):
        qpa.serve.load(model, files[0])
    monkeypatch.setenv("QPA_BASIS", str(basis.directory))
    assert isinstance(qpa.serve.load(model, files[0]), PeftModel)


def test_many_adapters_share_a_model_and_an_opened_basis(llama, files, basis):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    base = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        plain = base(tokens).logits
        model = base
        for file in files:
            model = qpa.serve.load(model, file, basis=basis, adapter_name=file.name)
        logits = []
        for file in files:
            model.set_adapter(file.name)
            logits.append(model(tokens).logits)
        alone = qpa.serve.load(AutoModelForCausalLM.from_pretrained(llama), files[1], basis=basis)
        assert torch.equal(alone(tokens).logits, logits[1])
    assert not torch.allclose(logits[0], plain) and not torch.allclose(logits[0], logits[1])


def test_a_damaged_file_leaves_the_model_alone(llama, files, basis):
    model = AutoModelForCausalLM.from_pretrained(llama)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(DocumentError, match="SHA-256"):
        qpa.serve.load(model, files[0], basis=basis)
    assert not any("lora" in name for name, _ in model.named_modules())
