"""A quantised base model whose packages are missing is refused before anything is loaded."""

from __future__ import annotations

import pytest
from transformers import GPTQConfig, LlamaConfig
from transformers.quantizers import quantizer_gptq

from qpa.errors import ModelError
from qpa.models.quantization import check_quantization
from tests.test_train_generator import plan

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def config(settings):
    return LlamaConfig(**SHAPE, vocab_size=64, quantization_config=settings)


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(quantizer_gptq, "is_optimum_available", lambda: False)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("settings", [GPTQ, GPTQConfig(bits=4)], ids=["as stored", "as an object"])
def test_missing_packages_are_named(settings):
    with pytest.raises(ModelError) as caught:
        check_quantization(config(settings), "it")
    assert str(caught.value) == (
        "it: expected the packages that load gptq weights, found none: Loading a GPTQ quantized model "
        "requires optimum (`pip install optimum`); install them, or use the model before it was quantised"
    )


@pytest.mark.usefixtures("no_packages")
def test_a_plan_for_a_base_that_cannot_be_loaded_is_refused(tmp_path):
    config(GPTQ).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model: expected the packages that load gptq weights"):
        plan(tmp_path / "model", tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "tarot"}, {"bits": 4, "group_size": 64}, {"quant_method": "gptq", "bits": 77}],
)
def test_weights_quantised_in_an_unknown_way_are_refused(settings):
    with pytest.raises(ModelError, match="it: expected weights quantised in a way that transformers loads, "):
        check_quantization(config(settings), "it")


@pytest.mark.parametrize("settings", [None, {"quant_method": "fp8"}], ids=str)
def test_what_needs_no_further_package_is_not_refused(settings):
    """Nor is what needs another device: training may run where it is."""
    check_quantization(config(settings), "it")


def test_a_device_that_is_missing_is_no_fault(monkeypatch):
    class Quantizer:
        def validate_environment(self, **_):
            raise RuntimeError("GPU is required to quantize or run quantize model.")

    monkeypatch.setattr("transformers.quantizers.AutoHfQuantizer.from_config", lambda *_, **__: Quantizer())
    check_quantization(config(GPTQ), "it")
