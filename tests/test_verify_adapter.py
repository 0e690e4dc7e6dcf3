"""verify-adapter: a good export passes in a fresh process, and nothing silent gets past it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpa.compat.peft_ import CONFIG_FILE
from qpa.documents import MANIFEST_PATH, Verification, read_manifest
from qpa.errors import DocumentError, ModelError, OptionError, VerificationError
from qpa.exporters.contracts.lora import WEIGHTS_FILE
from qpa.exporters.formats.lora import ExportLora
from qpa.passes import verification_pipeline, verify_adapter
from qpa.passes.verify_adapter import WORKER, VerifyAdapter
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import tiny_llama
from tests.traced_model import traced_model

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Tensors = dict[str, torch.Tensor]
ENGINES = ("peft", "transformers")


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a random adapter on a tiny Llama."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"), alpha=6.0)


@pytest.fixture
def out(made: RandomAdapter, tmp_path: Path) -> Path:
    """Return a fresh export of `made`."""
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    return tmp_path / "out"


@pytest.fixture
def no_static_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave finding the defect to the engines."""
    monkeypatch.setattr(ExportLora, "findings", lambda *_: ())


def _verify(out: Path, made: RandomAdapter, **options: object) -> Verification:
    return VerifyAdapter(directory=str(out), **options).run(read_manifest(out), made.context)


def _change(out: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(out / WEIGHTS_FILE).items()}
    save_file(change(tensors), out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / WEIGHTS_FILE).chmod(0o644)


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def test_a_fresh_process_agrees_with_the_live_model(out, made):
    context = verification_pipeline(VerifyAdapter(directory=str(out))).run(read_manifest(out), made.context)
    verification = context.document(Verification)
    assert [check.engine for check in verification.engines] == list(ENGINES)
    assert verification.provenance.parent == read_manifest(out).digest
    for check in verification.engines:
        assert check.max_logit_difference < 1e-4 < 0.1 < check.max_base_difference
        assert check.greedy_tokens_equal and len(check.greedy_tokens) == 16
        assert check.missing_keys == check.unexpected_keys == ()


@pytest.mark.usefixtures("in_process")
def test_conv1d_adapters_agree_too(gpt2, tmp_path):
    made = random_adapter(gpt2, tmp_path / "store")
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    assert len(_verify(tmp_path / "out", made).engines) == 2


@pytest.mark.usefixtures("in_process")
def test_the_base_may_have_moved(out, made, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "moved")
    assert _verify(out, made, model=str(tmp_path / "moved"), engines=("peft",)).tolerance == 1e-5


@pytest.mark.usefixtures("in_process", "no_static_check")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    ("engine", "old", "new", "message"),
    [
        ("peft", "base_model.model.", "", "missing key"),
        ("peft", "base_model.model.", "model.base_model.", "missing key"),
        ("peft", "layers.1.", "layers.7.", "missing key"),
        ("peft", "layers.1.mlp.up_proj.lora_A.", "layers.1.mlp.up_proj.lora_X.", "missing key"),
        ("transformers", ".weight", ".default.weight", "missing key"),
        ("transformers", "base_model.model.model.", "other.", "missing key"),
        ("transformers", "layers.1.", "layers.7.", "missing key"),
        ("transformers", "layers.1.mlp.up_proj.lora_A.", "layers.1.mlp.up_proj.lora_X.", "missing key"),
    ],
)
def test_renamed_keys_are_never_silent(out, made, engine, old, new, message):
    _change(out, _renamed(old, new))
    with pytest.raises(VerificationError, match=message):
        _verify(out, made, engines=(engine,))


@pytest.mark.usefixtures("in_process", "no_static_check")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_too_many_is_unexpected(out, made, engine):
    extra = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}
    _change(out, lambda tensors: tensors | extra)
    with pytest.raises(VerificationError, match="unexpected key"):
        _verify(out, made, engines=(engine,))


@pytest.mark.usefixtures("in_process", "no_static_check")
@pytest.mark.parametrize("engine", ENGINES)
def test_slightly_other_numbers_are_found(out, made, engine):
    _change(out, lambda tensors: {name: 1.001 * tensor for name, tensor in tensors.items()})
    with pytest.raises(VerificationError, match="found a difference of"):
        _verify(out, made, engines=(engine,))


@pytest.mark.usefixtures("in_process", "no_static_check")
def test_an_adapter_of_zeros_in_place_of_the_trained_one_is_found(out, made):
    _change(out, lambda tensors: {name: 0.0 * tensor for name, tensor in tensors.items()})
    with pytest.raises(VerificationError, match="the adapter was ignored"):
        _verify(out, made, engines=("peft",))


@pytest.mark.usefixtures("in_process")
def test_an_untrained_adapter_changes_nothing_and_says_so(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store", scale=0.0)
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    with pytest.raises(VerificationError, match="the adapter changes nothing"):
        _verify(tmp_path / "out", made)


def test_the_static_contract_comes_first(out, made):
    _change(out, _renamed("base_model.model.", ""))
    with pytest.raises(VerificationError, match=r"L14 .* more with `static`"):
        _verify(out, made)


def test_another_manifest_is_refused(out, made):
    other = read_manifest(out).model_copy(update={"rank": 5})
    with pytest.raises(VerificationError, match="the files of this manifest"):
        VerifyAdapter(directory=str(out)).run(other, made.context)


@pytest.mark.usefixtures("in_process")
def test_a_base_with_other_weights_is_refused(out, made, tmp_path):
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(VerificationError, match="not the ones the adapter was trained on"):
        _verify(out, made, model=str(other))


def test_a_base_with_another_config_is_refused(out, made, gpt2):
    with pytest.raises(VerificationError, match="the config the adapter was planned for"):
        _verify(out, made, model=str(gpt2))


def test_a_missing_base_is_refused(out, made, tmp_path):
    with pytest.raises(VerificationError, match="no such directory; say where the base model is: `model`"):
        _verify(out, made, model=str(tmp_path / "gone"))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_downloaded_manifest_cannot_run_python_code(out, made, tmp_path, allowed):
    model, marker = traced_model(tmp_path / "model")
    base = made.frozen.base.model_copy(update={"name_or_path": str(model), "trust_remote_code": True})
    forged = read_manifest(out).model_copy(update={"base": base})
    (out / MANIFEST_PATH).write_bytes(forged.to_json())
    expected = (VerificationError, "was planned for") if allowed else (ModelError, "`trust_remote_code`")
    with pytest.raises(expected[0], match=expected[1]):
        _verify(out, made, trust_remote_code=allowed)
    assert not marker.exists()


def test_a_local_base_that_is_gone_is_not_looked_for_on_the_hub(out, made, monkeypatch):
    base = made.frozen.base.model_copy(update={"name_or_path": "models/gone"})
    forged = read_manifest(out).model_copy(update={"base": base})
    (out / MANIFEST_PATH).write_bytes(forged.to_json())
    with pytest.raises(VerificationError, match=r"^models/gone: .* no such directory; .*`model`"):
        _verify(out, made)


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="`static`"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("options", [{"engines": ()}, {"engines": ("vllm",)}, {"tolerance": 0.0}])
def test_options_out_of_range_are_refused(out, made, options):
    with pytest.raises(OptionError):
        replace(VerifyAdapter(directory=str(out)), **options).run(read_manifest(out), made.context)


CRASHES = {
    "raise RuntimeError('first line\\nlast line')": "last line",
    "import os; os.kill(os.getpid(), 9)": "exit status -9",
}


@pytest.mark.parametrize("code", CRASHES)
def test_a_crash_of_the_worker_is_one_line(out, made, tmp_path, monkeypatch, code):
    (tmp_path / "worker.py").write_text(code)
    monkeypatch.setattr(verify_adapter, "WORKER", tmp_path / "worker.py")
    with pytest.raises(VerificationError, match=f"found {CRASHES[code]}$"):
        _verify(out, made)


ANSWER = {
    "base_tokens_equal": None,
    "engine": "peft",
    "max_logit_difference": 0.0,
    "max_base_difference": 1.0,
    "greedy_tokens": [1],
    "greedy_tokens_equal": True,
    "missing_keys": [],
    "unexpected_keys": [],
}


NO_LOGITS = {"max_logit_difference": None, "max_base_difference": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"greedy_tokens_equal": False}, "greedy tokens"),
        ({"max_logit_difference": float("nan"), "max_base_difference": float("nan")}, "a difference of nan"),
        ({"max_base_difference": 0.0}, "changes nothing"),
        ({"max_logit_difference": 9e-6, "max_base_difference": 2e-5}, "four times nearer"),
        (NO_LOGITS | {"greedy_tokens_equal": False}, "greedy tokens"),
        (NO_LOGITS | {"greedy_tokens": [2], "greedy_tokens_equal": False}, "the adapter was ignored"),
        (NO_LOGITS | {"greedy_tokens": [2]}, "the adapter changes nothing"),
    ],
)
def test_every_answer_is_judged(out, made, tmp_path, monkeypatch, fields, message):
    answer = {"largest_live_logit": 1.0, "largest_adapter_effect": 1.0, "base_difference": 0.0}
    answer |= {"base_tokens": [2], "engines": [ANSWER | fields]}
    (tmp_path / "worker.py").write_text(f"print({json.dumps(json.dumps(answer))})")
    monkeypatch.setattr(verify_adapter, "WORKER", tmp_path / "worker.py")
    with pytest.raises(VerificationError, match=message):
        _verify(out, made)


@pytest.mark.parametrize(
    "module", ["qpa", "qpa.generators.generator", "qiskit", "qiskit_aer", "qiskit.quantum_info"]
)
def test_the_worker_cannot_import_the_generator(module):
    code = (
        "import runpy, sys\n"
        f"names = runpy.run_path({str(WORKER)!r})\n"
        "sys.meta_path.insert(0, names['ImportBlocker']())\n"
        f"import {module}"
    )
    finished = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "must not be needed to serve an adapter" in finished.stderr


def test_the_worker_names_nothing_of_qpa():
    lines = WORKER.read_text().splitlines()
    imports = [line.split()[1] for line in lines if line.strip().startswith(("import ", "from "))]
    assert imports and not any(name.startswith(("qpa", "qiskit")) for name in imports)


TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 1\n    load()\n"


@pytest.mark.parametrize(
    ("stderr", "found"),
    [
        (
            f"{TRACEBACK}ValueError: one of:\n(1) a file,\n(2) a class.",
            "ValueError: one of: (1) a file, (2) a class",
        ),
        (
            f"{TRACEBACK}KeyError: 'a'\n\nDuring handling:\n\n{TRACEBACK}TypeError: b",
            "TypeError: b",
        ),
        (
            "[rank0]: "
            + TRACEBACK.replace("\n  ", "\n[rank0]:   ").replace("\n    ", "\n[rank0]:     ")
            + "[rank0]: ValueError: no",
            "ValueError: no",
        ),
        (
            f"{TRACEBACK}RuntimeError: two faults:\n\tone,\n\tanother",
            "RuntimeError: two faults: one, another",
        ),
        (TRACEBACK, "load()"),
        ("a remark\nKilled", "Killed"),
        ("", "exit status 3"),
    ],
)
@pytest.mark.usefixtures("no_static_check")
def test_what_an_engine_raised_is_told_whole(made, tmp_path, monkeypatch, stderr, found):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 3, "", stderr)

    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    monkeypatch.setattr(verify_adapter.subprocess, "run", run)
    with pytest.raises(VerificationError) as caught:
        VerifyAdapter(directory=str(tmp_path / "out")).run(read_manifest(tmp_path / "out"), made.context)
    assert caught.value.found == found


@pytest.mark.usefixtures("in_process", "no_static_check")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_type_is_judged_by_its_rounding_and_not_more(made, tmp_path, dtype):
    out = tmp_path / "out"
    ExportLora(dtype=dtype).emit(made.frozen, out, made.context)
    (check,) = _verify(out, made, engines=("peft",)).engines
    assert 1e-4 < check.max_logit_difference < 0.1 * check.max_base_difference
    _change(out, lambda tensors: {name: 0.6 * tensor for name, tensor in tensors.items()})
    with pytest.raises(VerificationError, match="found a difference of"):
        _verify(out, made, engines=("peft",))


@pytest.mark.usefixtures("in_process")
def test_a_tolerance_that_is_given_holds_for_a_smaller_type_too(made, tmp_path):
    out = tmp_path / "out"
    ExportLora(dtype="bfloat16").emit(made.frozen, out, made.context)
    by_default = _verify(out, made, engines=("peft",))
    found = by_default.engines[0].max_logit_difference
    assert by_default.tolerance == 1e-5 < found < by_default.engines[0].bound
    with pytest.raises(VerificationError, match="found a difference of"):
        _verify(out, made, engines=("peft",), tolerance=1e-5)
    given = _verify(out, made, engines=("peft",), tolerance=found)  # in units of at least 1
    assert given.tolerance == found <= given.engines[0].bound < by_default.engines[0].bound


def test_a_tolerance_that_is_given_holds_for_an_engine_that_rounds_too():
    given, by_default = (VerifyAdapter(directory="out", tolerance=value) for value in (1e-5, None))
    assert given._bound("llama.cpp", 2.0, 0.0) == 2e-5 < by_default._bound("llama.cpp", 2.0, 0.0)


def test_python_wants_the_engines_named(out, made):
    with pytest.raises(OptionError, match=r"^engines: expected names of engines beside `python`"):
        _verify(out, made, python=sys.executable)


@pytest.mark.usefixtures("no_static_check")
def test_another_python_is_asked_by_itself(out, made):
    (check,) = _verify(out, made, engines=("peft",), python=sys.executable).engines
    assert check.greedy_tokens_equal and check.max_logit_difference < 1e-4


@pytest.mark.usefixtures("no_static_check")
def test_a_rank_that_vllm_does_not_serve_is_one_line(out, made):
    config = json.loads((out / CONFIG_FILE).read_bytes())
    (out / CONFIG_FILE).write_text(json.dumps(config | {"r": 513}))
    found = "ValueError: vLLM serves ranks up to 512, and this LoRA has rank 513"
    with pytest.raises(VerificationError) as error:
        _verify(out, made, engines=("vllm",), python=sys.executable)
    assert error.value.found == found
