"""Loading a base model: whose permission counts, which config counts, and where it is looked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from qpa.documents import BaseModelReference
from qpa.errors import ModelError
from qpa.models.base_model import config_file_digest, load_config, load_model, load_tokenizer
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from tests.traced_model import traced_model


def reference(path: Path | str, **fields: object) -> BaseModelReference:
    base = BaseModelReference(
        name_or_path=str(path),
        local=True,
        revision=None,
        config_digest=config_file_digest(str(path)) if Path(path).is_dir() else "",
        model_type="",
        architecture="",
        ties_lm_head=False,
        trust_remote_code=False,
    )
    return base.model_copy(update=fields)


# Whose permission counts

LOADS = {
    "model": lambda base, **options: load_model(base, keep_dtype=False, **options),
    "tokenizer": load_tokenizer,
}


@pytest.mark.parametrize("what", LOADS)
@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_document_says_is_no_permission(tmp_path, what, recorded):
    model, marker = traced_model(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        LOADS[what](reference(model, trust_remote_code=recorded))
    assert not marker.exists()
    if recorded:
        assert caught.value.advice == "pass `trust_remote_code` if you trust the model's own Python code"


@pytest.mark.parametrize("what", LOADS)
def test_no_code_of_another_config_runs_even_when_it_is_allowed(tmp_path, what):
    model, marker = traced_model(tmp_path / "model")
    base = reference(model, trust_remote_code=True, config_digest="sha256:" + "0" * 64)
    with pytest.raises(ModelError, match="the config the adapter was planned for"):
        LOADS[what](base, trust_remote_code=True)
    assert not marker.exists()


def test_a_config_runs_its_code_only_when_the_user_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, marker = traced_model(tmp_path / "model")
    with pytest.raises(ModelError):
        load_config(str(model))
    assert not marker.exists()
    assert load_config(str(model), trust_remote_code=True).model_type == "traced"
    assert marker.exists()


# Which config counts


def changed(llama: Path, path: Path, **fields: object) -> str:
    path.mkdir(exist_ok=True)
    content = json.loads((llama / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | fields))
    return config_file_digest(str(path))


@pytest.mark.parametrize(
    "fields",
    [
        {"transformers_version": "9.0.0"},
        {"dtype": "bfloat16", "torch_dtype": "float16"},
        {"use_cache": False},
        {"_name_or_path": "elsewhere"},
        {"architectures": None},
    ],
    ids=str,
)
def test_what_changes_no_function_does_not_count(llama, tmp_path, fields):
    assert changed(llama, tmp_path, **fields) == config_file_digest(str(llama))
    nested = changed(llama, tmp_path, text_config={"hidden_size": 8} | fields)
    assert nested == changed(llama, tmp_path, text_config={"hidden_size": 8})


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 128},
        {"rms_norm_eps": 1e-3},
        {"num_hidden_layers": 3},
        {"model_type": "qwen2"},
        {"text_config": {"hidden_size": 8}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    ],
    ids=str,
)
def test_what_changes_shapes_or_function_counts(llama, tmp_path, fields):
    assert changed(llama, tmp_path, **fields) != config_file_digest(str(llama))


def test_a_release_that_adds_a_default_changes_no_digest(llama, monkeypatch):
    from transformers import LlamaConfig

    before = config_file_digest(str(llama))
    monkeypatch.setattr(LlamaConfig, "a_new_field", True, raising=False)
    to_dict = LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: to_dict(self) | {"a_new_field": True})
    assert load_config(str(llama)).to_dict()["a_new_field"]
    assert config_file_digest(str(llama)) == before


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"a": ' + "[" * 900 + "]" * 900 + "}"])
def test_a_hostile_config_is_one_error_or_a_digest(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    try:
        config_file_digest(str(tmp_path))
    except ModelError as error:
        assert error.subject == str(tmp_path)


def test_half_a_surrogate_pair_in_a_config_is_called_by_its_name(llama, tmp_path):
    with pytest.raises(ModelError, match=r"found half of a surrogate pair in a string$"):
        changed(llama, tmp_path, note="\ud83d")


@pytest.mark.parametrize("read", [config_file_digest, load_config])
def test_a_byte_order_mark_in_a_config_is_called_by_its_name(llama, tmp_path, read):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + (llama / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"config\.json: .* found a byte order mark; save it as UTF-8"):
        read(str(tmp_path))


# Where it is looked for


def test_a_plan_records_that_its_base_was_local(llama):
    context = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))
    base = InspectModel(model=str(llama)).run(None, context).base
    assert base.local and base.head == "lm_head" and not base.ties_lm_head


@pytest.mark.parametrize("what", LOADS)
def test_a_local_directory_that_is_gone_is_never_looked_for_on_the_hub(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^models/gone: .* found no such directory"):
        LOADS[what](reference("models/gone"))


# What is said when something is missing


def test_a_directory_without_a_tokenizer_is_told(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(reference(tmp_path / "model"))
    assert str(caught.value) == (
        f"{tmp_path / 'model'}: expected a tokenizer in the model's directory, found no tokenizer file, "
        "such as tokenizer.json; copy the tokenizer's files from where the model comes from"
    )


def test_a_tokenizer_that_cannot_be_made_is_told_to_the_end(llama, tmp_path):
    """What transformers says is a list of several lines, of which the first ends in a colon."""
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(reference(tmp_path / "model"))
    assert "from one of: (1) " in caught.value.found and "(3) " in caught.value.found
    assert not caught.value.found.endswith((":", ",", "or"))


@pytest.mark.parametrize(
    ("n_missing", "found"),
    [(1, "none for model.layers.0.mlp.down_proj.weight"), (2, "none for .*down_proj.weight and 1 more")],
)
def test_missing_weights_are_counted(llama, tmp_path, n_missing, found):
    shutil.copytree(llama, tmp_path / "model")
    weights = load_file(llama / "model.safetensors")
    for name in ("down_proj", "gate_proj")[:n_missing]:
        del weights[f"model.layers.0.mlp.{name}.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"expected weights for every parameter, found {found}$"):
        load_model(reference(tmp_path / "model"), keep_dtype=False)


def test_a_package_that_is_missing_is_named(llama, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise ImportError(
            "\nIt requires the timm library. You can install it with pip:\n`pip install timm`.\nNote"
        )

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ModelError) as caught:
        load_model(reference(llama), keep_dtype=False)
    assert caught.value.expected == "the packages that this model needs"
    assert caught.value.found.endswith("install it with pip: `pip install timm`")
