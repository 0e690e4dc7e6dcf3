"""A base with rounded weights trains an adapter that is for the base as it is.

bitsandbytes and torchao are extras; without one its tests are skipped. With one, its quantisations train on
the CPU too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from qpa.documents import AdapterSpec, FrozenAdapter, TrainedGenerator, read_manifest
from qpa.errors import OptionError
from qpa.exporters.formats.lora import ExportLora
from qpa.models.base_model import load_model
from qpa.models.quantization import QUANTIZATIONS
from qpa.passes import verification_pipeline
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.pass_protocol import PassContext
from qpa.report.facts import frozen_rows
from qpa.store.run_directory import DirectoryStore, RunDirectory
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train
from tests.tiny_architectures import tiny
from tests.tiny_models import SHAPE, special_tokens, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, which warn of themselves

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ),
]


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama whose sides are multiples of the blocks of 64 numbers that NF4 rounds together."""
    config = LlamaConfig(**SHAPE | {"intermediate_size": 128}, **special_tokens())
    return write_model(tmp_path_factory.mktemp("models") / "llama", config, 0)


@pytest.fixture(params=["4bit", "8bit", "int8"])
def quantize(request: pytest.FixtureRequest) -> str:
    package = QUANTIZATIONS[request.param].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    name: str = request.param
    return name


def probe_of(run: RunDirectory, document: Any) -> dict[str, torch.Tensor]:
    return load_file(run.files.get(document.probe))


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_of_a_rounded_base_is_frozen_and_verified_with_the_base_as_it_is(
    even_llama: Path, text_file: Path, tmp_path: Path, quantize: str, device: str
) -> None:
    run = plan(even_llama, tmp_path / "run")
    frozen = train(run, text_file, quantize=quantize, device=device, max_steps=12)
    assert frozen.result.quantization == quantize
    assert frozen.result.eval_loss < frozen.result.base_loss
    # The tensors are the live model's; the probe is of the base in full, and was answered by another model.
    trained = run.read(TrainedGenerator)
    assert frozen.arrays == trained.adapter
    live, full = probe_of(run, trained), probe_of(run, frozen)
    assert torch.equal(live["input_ids"], full["input_ids"])
    assert not torch.equal(live["base_logits"], full["base_logits"])
    base = load_model(run.read(AdapterSpec).base, keep_dtype=False)
    with torch.no_grad():
        logits = base(input_ids=full["input_ids"][None]).logits[0][:, full["columns"]]
    torch.testing.assert_close(full["base_logits"], logits, rtol=1e-5, atol=1e-5)
    # It gains on the base in full as well, and the tables and the card say what it was trained on.
    assert frozen.frozen_loss is not None and frozen.frozen_loss < frozen.result.base_loss
    assert frozen.frozen_loss != frozen.result.eval_loss
    words = QUANTIZATIONS[quantize].words
    assert ("base in training", words) in frozen_rows(run.read_through(FrozenAdapter))
    out = tmp_path / "lora"
    documents = run.read_through(FrozenAdapter)
    ExportLora().emit(frozen, out, PassContext(0, run.files, documents))
    assert words in (out / "README.md").read_text()
    assert f"{frozen.frozen_loss:.4f}" in (out / "README.md").read_text()
    manifest = read_manifest(out)
    verify = VerifyAdapter(directory=str(out), engines=("peft", "transformers"))
    context = PassContext(0, DirectoryStore(out), (manifest,))
    verification_pipeline(verify).run(manifest, context, lambda document: None)


def test_a_training_on_a_rounded_base_is_resumed_to_the_same_bits(
    even_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    whole, halved = plan(even_llama, tmp_path / "whole"), plan(even_llama, tmp_path / "halved")
    options: dict[str, Any] = {"quantize": quantize, "grad_accum": 2}
    train(whole, text_file, **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(halved, text_file, **options)
    train(halved, text_file, **options, resume=True)
    assert same_bits(tensors(whole), tensors(halved))
    assert {tensor.dtype for tensor in tensors(whole).values()} == {torch.float32}


def test_what_cannot_be_rounded_is_refused(
    llama: Path, gpt2: Path, text_file: Path, tmp_path: Path, quantize: str
) -> None:
    run = plan(
        llama, tmp_path / "prefix", inspect={"method": "prefix", "rank": 2}, circuits=None, layers=None
    )
    with pytest.raises(OptionError, match="quantize: expected `method` lora, found prefix"):
        train(run, text_file, quantize=quantize)
    if quantize == "int8":
        run = plan(gpt2, tmp_path / "gpt2")
        with pytest.raises(OptionError, match="layers that torchao rounds, found GPT2LMHeadModel"):
            train(run, text_file, quantize=quantize)


@pytest.mark.parametrize("name", ["4bit", "8bit", "int8"])
def test_a_missing_package_is_named(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("qpa.models.quantization.importlib.util.find_spec", lambda _: None)
    run = plan(llama, tmp_path / "run")
    with pytest.raises(OptionError, match=r"quantize: expected the package \w+, found none; pip install"):
        train(run, text_file, quantize=name)


def test_layers_that_peft_adapts_by_their_weights_are_not_rounded(text_file: Path, tmp_path: Path) -> None:
    run = plan(tiny("deepseek-v3", tmp_path / "model"), tmp_path / "run")
    with pytest.raises(
        OptionError, match=r"added to gate_proj\.weight, .*; plan with `targets` attention,exp"
    ):
        train(run, text_file, quantize="int8")
