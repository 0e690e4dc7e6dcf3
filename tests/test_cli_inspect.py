"""qpa inspect on adapter directories of any origin: nothing hostile raises or reaches the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qpa.documents import MANIFEST_PATH
from qpa.exporters.contracts.export import check_contract
from qpa.exporters.contracts.lora import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from qpa.exporters.formats.merged import ExportMerged
from tests.command_line import Cli
from tests.random_adapter import random_adapter

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MODULE = f"{KEY_PREFIX}model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 2,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "owner/base",
    "inference_mode": True,
    "fan_in_fan_out": False,
}

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return a hand-made adapter directory that keeps the contract."""
    tensors = {
        f"{MODULE}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{MODULE}.lora_B.weight": np.ones((6, 2), np.float32),
    }
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    (tmp_path / WEIGHTS_FILE).chmod(0o644)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def inspect(cli: Cli) -> Inspect:
    """Return a function that runs `qpa inspect`: exit code, stdout, stderr."""
    return partial(cli, "inspect")


def test_an_adapter_of_any_origin_is_shown(adapter, inspect):
    code, out, _ = inspect(adapter)
    assert code == 0
    assert all(words in out for words in ("owner/base", "2, 20 numbers, F32", "kept", "no qpa/manifest.json"))
    content = json.loads(inspect(adapter, "--json")[1])
    assert (content["n_tensors"], content["n_numbers"], content["findings"]) == (2, 20, [])


@pytest.mark.parametrize("depth", [40, 400, 900, 100_000])
@pytest.mark.parametrize("name", [CONFIG_FILE, MANIFEST_PATH])
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_deeply_nested_json_is_one_line(adapter, inspect, depth, name, options):
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_text('{"schema": "qpa.manifest/1", "r": ' + "[" * depth + "]" * depth + "}")
    code, out, err = inspect(adapter, *options)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", [CONFIG_FILE, MANIFEST_PATH])
def test_a_huge_file_is_not_read(adapter, inspect, name):
    (adapter / name).parent.mkdir(exist_ok=True)
    with (adapter / name).open("wb") as stream:
        stream.truncate(1 << 33)
    code, _, err = inspect(adapter)
    assert code == 1 and "bytes" in err


@pytest.mark.parametrize(
    "field", ["peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "bias"]
)
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text]], ids=["text", "list"])
def test_control_characters_do_not_reach_the_terminal(adapter, inspect, field, wrap):
    hostile = wrap("\x1b]0;owned\x07\x1b[31m\u202e\ud800" + "x" * 1000)
    (adapter / CONFIG_FILE).write_text(json.dumps(CONFIG | {field: hostile}))
    for options in ((), ("--json",)):
        code, out, err = inspect(adapter, *options)
        assert code == 0 and all(c.isprintable() or c == "\n" for c in out + err)
    assert "x" * 200 not in inspect(adapter)[1]


def test_weights_that_are_none_are_one_line(adapter, inspect):
    (adapter / WEIGHTS_FILE).write_bytes(b"\xff" * 64)
    assert inspect(adapter)[2].startswith(f"error: {WEIGHTS_FILE}: ")
    (adapter / WEIGHTS_FILE).unlink()
    assert inspect(adapter)[2].startswith(f"error: {WEIGHTS_FILE}: ")


@pytest.fixture
def merged(llama: Path, tmp_path: Path) -> Path:
    """Return an export that is no LoRA directory."""
    made = random_adapter(llama, tmp_path / "store")
    ExportMerged(dtype="bfloat16").emit(made.frozen, tmp_path / "merged", made.context)
    return tmp_path / "merged"


def test_an_export_of_another_format_is_shown_and_checked(merged, inspect):
    code, out, _ = inspect(merged)
    assert code == 0
    assert all(words in out for words in ("merged: merged", "4, bfloat16", "model.safetensors", "kept"))
    content = json.loads(inspect(merged, "--json")[1])
    assert (content["format"], content["rank"], content["findings"]) == ("merged", 4, [])
    (merged / "config.json").write_text("{}")
    (finding,) = json.loads(inspect(merged, "--json")[1])["findings"]
    assert finding.startswith("L20 config.json: expected ")


def says_the_same(path, damaged, content):
    """Return whether a manifest differs in white space only, which no digest of its content sees."""
    if damaged == content or path.name != "manifest.json":
        return damaged == content
    try:
        return json.loads(damaged) == json.loads(content)
    except ValueError:
        return False


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_exports_give_findings_and_never_raise(merged, data):
    """Damage one file of a good export in one place."""
    files = sorted(path for path in merged.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content[: data.draw(st.sampled_from([start, len(content)]))])
    damaged[start : start + 1] = data.draw(
        st.binary(max_size=3).filter(lambda b: b != content[start : start + 1])
    )
    path.write_bytes(damaged)
    try:
        assert check_contract(merged) or says_the_same(path, bytes(damaged), content)
    finally:
        path.write_bytes(content)
    assert check_contract(merged) == ()
