"""The static contract: every deviation is found, by its rule, and nothing hostile gets through."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from qpa.documents import MANIFEST_PATH
from qpa.exporters.contracts.lora import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    Finding,
    check_lora_contract,
    module_of_key,
    selects,
)

RANK = 2
MODULE = "model.layers.0.self_attn.q_proj"
KEY_A = f"{KEY_PREFIX}{MODULE}.lora_A.weight"
KEY_B = f"{KEY_PREFIX}{MODULE}.lora_B.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return a hand-made adapter directory, of no qpa origin, that keeps the contract."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
        "base_model_name_or_path": "owner/base",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "loftq_config": {},
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    _save(directory, {KEY_A: np.ones((RANK, 4), np.float32), KEY_B: np.ones((6, RANK), np.float32)})
    return directory


def _save(directory: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, directory / WEIGHTS_FILE, metadata=metadata or {"format": "pt"})
    (directory / WEIGHTS_FILE).chmod(0o644)


def _configure(directory: Path, **fields: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _retensor(directory: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    _save(directory, change(load_file(directory / WEIGHTS_FILE)))


def _rules(directory: Path) -> list[str]:
    return [finding.rule for finding in check_lora_contract(directory)]


def test_a_plain_adapter_of_any_origin_keeps_the_contract(adapter):
    assert check_lora_contract(adapter) == ()


def test_a_finding_is_one_line():
    finding = Finding("L06", "adapter_config.json lora_alpha", "r, 2", "4")
    assert str(finding) == "L06 adapter_config.json lora_alpha: expected r, 2, found 4"


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("L04", {"peft_type": "IA3"}),
        ("L04", {"task_type": None}),
        ("L04", {"r": "2"}),
        ("L04", {"r": 0}),
        ("L04", {"r": True}),
        ("L04", {"lora_dropout": "0.1"}),
        ("L04", {"lora_dropout": True}),
        ("L04", {"lora_dropout": None}),
        ("L04", {"lora_dropout": 1.5}),
        ("L04", {"lora_dropout": float("nan")}),
        ("L04", {"base_model_name_or_path": None}),
        ("L04", {"base_model_name_or_path": ""}),
        ("L04", {"inference_mode": False}),
        ("L04", {"inference_mode": "true"}),
        ("L04", {"fan_in_fan_out": None}),
        ("L04", {"fan_in_fan_out": 0}),
        ("L05", {"target_modules": r".*\.q_proj"}),
        ("L05", {"target_modules": "all-linear"}),
        ("L05", {"target_modules": []}),
        ("L05", {"target_modules": None}),
        ("L06", {"lora_alpha": 2 * RANK}),
        ("L06", {"lora_alpha": None}),
        ("L07", {"use_rslora": True}),
        ("L08", {"use_dora": True}),
        ("L09", {"alpha_pattern": {"q_proj": 8}}),
        ("L09", {"rank_pattern": {"q_proj": 8}}),
        ("L10", {"bias": "lora_only"}),
        ("L10", {"lora_bias": True}),
        ("L11", {"modules_to_save": ["lm_head"]}),
        ("L19", {"target_parameters": ["experts.gate_up_proj"]}),
        ("L11", {"trainable_token_indices": [0]}),
        ("L11", {"layer_replication": [[0, 1]]}),
        ("L11", {"megatron_config": {"tensor_model_parallel_size": 1}}),
        ("L11", {"exclude_modules": ["o_proj"]}),
        ("L11", {"exclude_modules": "o_proj"}),
        ("L11", {"layers_to_transform": [1]}),
        ("L11", {"layers_to_transform": 0}),
        ("L11", {"layers_pattern": "layers"}),
        ("L12", {"init_lora_weights": "pissa"}),
        ("L12", {"init_lora_weights": "pissa_niter_4"}),
        ("L12", {"init_lora_weights": "olora"}),
        ("L12", {"init_lora_weights": "corda"}),
        ("L18", {"r": 4, "lora_alpha": 4}),
        ("L19", {"target_modules": ["k_proj"]}),
        ("L19", {"target_modules": ["q_proj", "k_proj"]}),
        ("L19", {"target_modules": ["proj"]}),
    ],
)
def test_each_config_deviation_is_found_by_its_rule(adapter, rule, fields):
    _configure(adapter, **fields)
    assert set(_rules(adapter)) == {rule}


EXPERTS = f"{KEY_PREFIX}model.layers.0.mlp.experts"


@pytest.fixture
def mixture(adapter: Path) -> Path:
    """Return a directory of an attention layer, a shared layer, and the stacked tensors of three experts."""
    _configure(
        adapter, target_parameters=["experts.gate_up_proj", "experts.down_proj", "shared.up_proj.weight"]
    )
    shapes = {
        f"{EXPERTS}.base_layer": (3 * RANK, 4, 10, 3 * RANK),
        EXPERTS: (3 * RANK, 5, 4, 3 * RANK),
        EXPERTS.replace("experts", "shared.up_proj"): (RANK, 4, 5, RANK),
    }
    added = {
        f"{module}.lora_{role}.weight": np.ones(sides, np.float32)
        for module, shape in shapes.items()
        for role, sides in (("A", shape[:2]), ("B", shape[2:]))
    }
    _retensor(adapter, lambda tensors: tensors | added)
    return adapter


def test_parameters_select_modules_too(mixture):
    assert check_lora_contract(mixture) == ()


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("L05", {"target_parameters": "experts.down_proj"}),
        ("L05", {"target_modules": None}),
        ("L18", {"target_parameters": ["experts.weight", "shared.up_proj.weight"]}),
        ("L19", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("L19", {"target_parameters": ["experts.down_proj", "shared.up_proj.weight", "router.weight"]}),
    ],
)
def test_parameters_that_do_not_fit_the_tensors_are_found(mixture, rule, fields):
    _configure(mixture, **fields)
    assert rule in _rules(mixture)


@pytest.mark.parametrize("n_columns", [RANK, 2 * RANK, 3 * RANK + 1])
def test_stacked_tensors_are_of_as_many_experts(mixture, n_columns):
    key = f"{EXPERTS}.lora_B.weight"
    _retensor(mixture, lambda tensors: tensors | {key: np.ones((4, n_columns), np.float32)})
    assert _rules(mixture) == ["L18"]


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_fine(adapter, kind):
    _configure(adapter, init_lora_weights=kind)
    assert check_lora_contract(adapter) == ()


@pytest.mark.parametrize(
    "fields",
    [{"exclude_modules": None, "layers_to_transform": [], "layers_pattern": ""}, {"lora_dropout": 0}],
    ids=str,
)
def test_fields_that_say_nothing_are_fine(adapter, fields):
    _configure(adapter, **fields)
    assert check_lora_contract(adapter) == ()


@pytest.mark.parametrize("name", ["base_model_name_or_path", "inference_mode", "fan_in_fan_out"])
def test_a_missing_field_is_found(adapter, name):
    content = json.loads((adapter / CONFIG_FILE).read_text())
    del content[name]
    (adapter / CONFIG_FILE).write_text(json.dumps(content))
    (finding,) = check_lora_contract(adapter)
    assert (finding.rule, finding.subject, finding.found) == ("L04", f"{CONFIG_FILE} {name}", "nothing")


def _renamed(old: str, new: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def _replaced(key: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {**tensors, key: value}


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("L14", _renamed(KEY_PREFIX, "")),
        ("L14", _renamed(KEY_PREFIX, "base_model.")),
        ("L14", _renamed(KEY_PREFIX, "model.base_model.")),
        ("L14", _renamed(KEY_PREFIX, KEY_PREFIX * 2)),
        ("L14", _renamed(".weight", ".default.weight")),
        ("L14", _replaced(f"{KEY_PREFIX}{MODULE}.lora_magnitude_vector", np.ones((1, 6), np.float32))),
        ("L14", _replaced(f"{KEY_PREFIX}lm_head.weight", np.ones((6, 4), np.float32))),
        ("L14", lambda _: {}),
        ("L15", lambda tensors: {KEY_A: tensors[KEY_A]}),
        ("L15", lambda tensors: {KEY_B: tensors[KEY_B]}),
        ("L16", _replaced(KEY_A, np.ones((1, RANK, 4), np.float32))),
        ("L16", _replaced(KEY_A, np.ones((RANK, 4), np.int8))),
        ("L17", _replaced(KEY_A, np.full((RANK, 4), np.nan, np.float32))),
        ("L17", _replaced(KEY_B, np.full((6, RANK), np.inf, np.float16))),
        ("L18", _replaced(KEY_A, np.ones((3, 4), np.float32))),
        ("L18", _replaced(KEY_B, np.ones((6, 3), np.float32))),
        ("L19", _renamed("q_proj", "o_proj")),
    ],
)
def test_each_tensor_deviation_is_found_by_its_rule(adapter, rule, change):
    _retensor(adapter, change)
    assert rule in _rules(adapter)


def test_not_a_number_is_found_in_bfloat16(adapter):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    good = {
        KEY_A: torch.ones(RANK, 4, dtype=torch.bfloat16),
        KEY_B: torch.ones(6, RANK, dtype=torch.bfloat16),
    }
    save_torch(good, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
    (adapter / WEIGHTS_FILE).chmod(0o644)
    assert check_lora_contract(adapter) == ()
    good[KEY_B][3, 1] = float("nan")
    save_torch(good, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
    (adapter / WEIGHTS_FILE).chmod(0o644)
    assert _rules(adapter) == ["L17"]


def test_several_ranks_are_one_finding_that_counts(adapter):
    _configure(adapter, target_modules=["q_proj", "v_proj", "o_proj"])
    more = {
        key.replace("q_proj", name): np.ones(shape, np.float32)
        for name in ("v_proj", "o_proj")
        for key, shape in ((KEY_A, (3, 4)), (KEY_B, (6, 3)))
    }
    _retensor(adapter, lambda tensors: tensors | more)
    (finding,) = check_lora_contract(adapter)
    assert (finding.rule, finding.found) == ("L18", "rank 3")
    assert finding.subject.endswith("and 3 more")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_found(adapter, name):
    (adapter / name).unlink()
    assert _rules(adapter) == ["L01"]


def test_something_that_is_no_adapter_is_found_quickly(tmp_path):
    assert {finding.found for finding in check_lora_contract(tmp_path / "nowhere")} == {"no such directory"}
    assert {finding.found for finding in check_lora_contract(tmp_path)} == {"nothing"}
    started = time.monotonic()
    assert check_lora_contract(Path("/")) != ()
    assert time.monotonic() - started < 1.0


def test_a_private_file_is_found(adapter):
    (adapter / WEIGHTS_FILE).chmod(0o600)
    (finding,) = check_lora_contract(adapter)
    assert (finding.rule, finding.found) == ("L02", "mode 0600")


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "deep/down/state.PKL"])
def test_a_pickle_is_found_and_not_opened(adapter, name):
    path = adapter / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"a": 1}))
    path.chmod(0o644)
    assert _rules(adapter) == ["L03"]


def test_a_second_safetensors_file_is_found(adapter):
    (adapter / "probe.safetensors").write_bytes(save({"x": np.ones(1, np.float32)}))
    assert _rules(adapter) == ["L03"]


def test_missing_metadata_is_found(adapter):
    _save(adapter, load_file(adapter / WEIGHTS_FILE), {"made": "elsewhere"})
    assert _rules(adapter) == ["L13"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": 1}}',
        (4).to_bytes(8, "little") + b"\xff\xfe\x00\x01",
    ],
)
def test_hostile_weights_are_a_finding(adapter, content):
    (adapter / WEIGHTS_FILE).write_bytes(content)
    assert _rules(adapter) == ["L13"]


def test_truncated_weights_are_a_finding(adapter):
    content = (adapter / WEIGHTS_FILE).read_bytes()
    for n_bytes in (1, 7, 8, 9, len(content) // 2, len(content) - 1):
        (adapter / WEIGHTS_FILE).write_bytes(content[:n_bytes])
        assert _rules(adapter) == ["L13"], n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"r": ' + "[" * 40 + "]" * 40 + "}",
        '{"r": ' + "9" * 10_000 + "}",
        "\xff\xfe{}",
    ],
    ids=["empty", "open", "list", "null", "too deep", "deep", "long number", "no text"],
)
def test_a_hostile_config_is_a_finding(adapter, text):
    (adapter / CONFIG_FILE).write_text(text, encoding="latin1")
    assert _rules(adapter) == ["L04"]


def test_a_huge_config_is_not_read(adapter):
    with (adapter / CONFIG_FILE).open("wb") as stream:
        stream.truncate(1 << 33)
    (finding,) = check_lora_contract(adapter)
    assert finding.rule == "L04" and "bytes" in finding.found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"schema": "qpa.manifest/1", "digest": "\\u001b[31m", "x": 1}',
        '{"schema": "qpa.manifest/1", "digest": "", "x": "\\ud800"}',
        '{"schema": "qpa.manifest/1", "x": ' + "[" * 900 + "]" * 900 + "}",
        "[" * 100_000,
    ],
    ids=["empty", "no schema", "control characters", "lone surrogate", "deep", "too deep"],
)
def test_a_hostile_manifest_is_a_finding(adapter, text):
    (adapter / "qpa").mkdir()
    (adapter / MANIFEST_PATH).write_text(text)
    findings = check_lora_contract(adapter)
    assert {finding.rule for finding in findings} == {"L20"}
    assert all(str(finding).isprintable() for finding in findings)


def test_control_characters_do_not_reach_the_terminal(adapter):
    _configure(adapter, peft_type="\x1b[31mred\nline" + "x" * 1000)
    (finding,) = check_lora_contract(adapter)
    assert str(finding).isprintable() and len(str(finding)) < 250


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise(adapter, data):
    name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    path = adapter / name
    original = path.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(content)
        assert all(str(finding).isprintable() for finding in check_lora_contract(adapter))
    finally:
        path.write_bytes(original)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from(
        [
            "lora_dropout",
            "layers_to_transform",
            "r",
            "lora_alpha",
            "target_modules",
            "bias",
            "rank_pattern",
            "init_lora_weights",
        ]
    ),
    value=JSON_VALUES,
)
def test_any_value_in_any_field_never_raises(adapter, name, value):
    path = adapter / CONFIG_FILE
    original = path.read_text()
    try:
        _configure(adapter, **{name: value})
        assert all(str(finding).isprintable() for finding in check_lora_contract(adapter))
    finally:
        path.write_text(original)


def test_names_match_as_in_peft():
    assert selects("q_proj", MODULE) and selects("self_attn.q_proj", MODULE) and selects(MODULE, MODULE)
    assert not selects("proj", MODULE) and not selects("q", MODULE) and not selects("v_proj", MODULE)
    assert module_of_key(KEY_A) == module_of_key(KEY_B) == MODULE


def test_the_check_needs_no_torch_and_less_than_a_second(adapter):
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from pathlib import Path\n"
        "from qpa.exporters.contracts.lora import check_lora_contract\n"
        f"findings = check_lora_contract(Path({str(adapter)!r}))\n"
        "heavy = {'torch', 'transformers', 'peft', 'qiskit'} & sys.modules.keys()\n"
        "print(len(findings), sorted(heavy), time.perf_counter() - start)"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(line[:2] == ["0", "[]"] for line in lines)
    assert min(float(line[2]) for line in lines) < 1.0
