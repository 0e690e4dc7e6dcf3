"""qpa export --format compact and qpa expand: from a run to a file, and back to the bytes of a plain LoRA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qpa.documents import WeightLayout
from qpa.generators.canonical import TrainedNumbers
from qpa.passes import basis_pipeline
from qpa.passes.calibrate_basis import CalibrateBasis
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.basis import Basis
from qpa.serve.compact import Compact
from qpa.serve.expansion import tensors
from qpa.store.run_directory import DirectoryStore, RunDirectory

ROOT = Path(__file__).parents[1]
DATA = ("--max-length", "32", "--batch-size", "2", "--device", "cpu")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def calibrate(directory, inspect, **options):
    """Make a basis in an empty directory."""
    files = DirectoryStore(directory)

    def keep(document):
        files.put(document.file_name(), document.to_json())

    basis_pipeline(inspect, CalibrateBasis(device="cpu", **options)).run(None, PassContext(0, files), keep)


@pytest.fixture(scope="module")
def calibrated(llama, text_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("basis")
    inspect = InspectModel(str(llama), rank=4)
    calibrate(directory, inspect, data=(str(text_file),), max_length=32, batch_size=2)
    return directory


@pytest.fixture
def make_run(cli, llama, calibrated, text_file, tmp_path):
    """Return a function that plans on the basis, and trains a few steps."""

    def make(*options, train=(), name="run"):
        out = tmp_path / name
        code, _, err = cli("plan", "--model", llama, "--basis", calibrated, "--out", out, *options)
        assert code == 0, err
        code, _, err = cli("train", out, "--data", text_file, "--max-steps", 4, *DATA, *train)
        assert code == 0, err
        return out

    return make


def exported(cli, run, out, *options):
    code, printed, err = cli("export", run, "--out", out, *options)
    assert code == 0, err
    return printed


def check_same_bytes(cli, run, basis, tmp_path):
    """Check that the compact file expands to the files of the format lora; return its size."""
    exported(cli, run, tmp_path / "lora", "--format", "lora")
    exported(cli, run, tmp_path / "store" / "tenant", "--format", "compact")
    code, _, err = cli("expand", tmp_path / "store" / "tenant", "--basis", basis, "--out", tmp_path / "out")
    assert code == 0, err
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == sorted(FILES)
    return (tmp_path / "store" / "tenant").stat().st_size


SIZES = {
    "one": ("--max-params", "1"),
    "log-linear": ("--max-params", "10"),
    "tables": ("--generator", "state", "--features", "tables"),
    "another-ansatz": ("--generator", "state", "--layers", "1", "--ansatz", "ry-cz-ring"),
}
"""Those that are not made of a real model below."""


@pytest.mark.parametrize("name", SIZES)
def test_an_expanded_file_has_the_bytes_of_the_format_lora(cli, make_run, calibrated, tmp_path, name):
    check_same_bytes(cli, make_run(*SIZES[name]), calibrated, tmp_path)
    compact = Compact.read(tmp_path / "store" / "tenant")
    assert compact.are_probabilities == (name == "another-ansatz")


def test_the_bytes_are_the_same_where_the_plan_has_the_base_elsewhere(
    cli, llama, calibrated, text_file, tmp_path
):
    elsewhere, run = shutil.copytree(llama, tmp_path / "elsewhere"), tmp_path / "run"
    planned = ("plan", "--model", elsewhere, "--basis", calibrated, "--max-params", "1", "--out", run)
    for arguments in (planned, ("train", run, "--data", text_file, "--max-steps", 1, *DATA)):
        code, _, err = cli(*arguments)
        assert code == 0, err
    check_same_bytes(cli, run, calibrated, tmp_path)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    code, _, err = cli("verify", tmp_path / "lora")
    assert code == 0, err


def test_where_probabilities_were_measured_they_are_kept(cli, make_run, calibrated, tmp_path):
    run = make_run("--max-params", "40")
    code, _, err = cli("freeze", run, "--source", "shots", "--shots", 500)
    assert code == 0, err
    check_same_bytes(cli, run, calibrated, tmp_path)
    assert Compact.read(tmp_path / "store" / "tenant").are_probabilities


def test_numbers_in_16_bits_are_off_by_half_a_step(cli, make_run, calibrated, tmp_path):
    run = make_run("--max-params", "40")
    for numbers in ("float32", "int16"):
        exported(cli, run, tmp_path / numbers, "--format", "compact", "--dtype", numbers)
    whole, rounded = (Compact.read(tmp_path / name) for name in ("float32", "int16"))
    for before, after in zip(whole.arrays, rounded.arrays, strict=True):
        assert np.abs(after - before).max() <= 0.501 * np.abs(before).max() / 32767
    basis = Basis.open(calibrated)
    exact = dict(tensors(tmp_path / "float32", basis))
    for key, tensor in tensors(tmp_path / "int16", basis):
        assert np.abs(tensor - exact[key]).max() <= 1e-3 * max(1e-9, np.abs(exact[key]).max())
    assert (tmp_path / "int16").stat().st_size < (tmp_path / "float32").stat().st_size < 512
    assert len([*(tmp_path / "layouts").iterdir()]) == 1


def test_a_machine_without_torch_expands_it(cli, make_run, calibrated, tmp_path):
    run = make_run("--max-params", "40")
    exported(cli, run, tmp_path / "lora", "--format", "lora")
    exported(cli, run, tmp_path / "tenant", "--format", "compact")
    program = (
        "import sys\n"
        "for name in ('torch', 'pydantic', 'qiskit', 'transformers', 'peft', 'ml_dtypes'):\n"
        "    sys.modules[name] = None\n"
        "from qpa.serve.expansion import main\n"
        f"sys.exit(main({[str(tmp_path / 'tenant'), str(calibrated), str(tmp_path / 'out')]}))\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()


def test_a_file_is_replaced_on_request_only(cli, make_run, tmp_path):
    run, out = make_run("--max-params", "10"), tmp_path / "tenant"
    command = ("export", run, "--format", "compact", "--out", out)
    exported(cli, run, out, "--format", "compact")
    assert "pass --force to replace it" in cli.refuses(*command)
    assert cli(*command, "--force")[0] == 0
    out.write_text("mine")
    assert "a file that is no compact adapter" in cli.refuses(*command, "--force")
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    assert "found a directory" in cli.refuses(*command, "--force")
    assert "--dtype: expected float32, bfloat16 or float16, found int16" in cli.refuses(
        "export", run, "--format", "lora", "--dtype", "int16", "--out", tmp_path / "other"
    )
    assert "--dtype: expected float32 or int16, found float16" in cli.refuses(*command, "--dtype", "float16")


def test_what_has_no_compact_form_is_refused_with_the_reason(cli, make_run, llama, text_file, tmp_path):
    network = make_run("--generator", "state", "--features", "network")
    out = tmp_path / "tenant"
    message = cli.refuses("export", network, "--format", "compact", "--out", out)
    assert "expanded without torch" in message and "found network" in message
    own = tmp_path / "own"
    assert cli("plan", "--model", llama, "--rank", 4, "--max-params", 10, "--out", own)[0] == 0
    assert cli("train", own, "--data", text_file, "--max-steps", 2, *DATA)[0] == 0
    message = cli.refuses("export", own, "--format", "compact", "--out", out)
    assert "expected an adapter planned on a shared basis, found one without; plan with --basis" in message
    assert not out.exists() and not (tmp_path / "layouts").exists()


def test_a_frozen_adapter_of_other_numbers_is_refused(cli, make_run, tmp_path, monkeypatch):
    run = make_run("--max-params", "10")
    monkeypatch.setattr(TrainedNumbers, "adapter", lambda *_: {"other": None})
    message = cli.refuses("export", run, "--format", "compact", "--out", tmp_path / "tenant")
    assert "the frozen adapter's numbers" in message and not (tmp_path / "tenant").exists()


def test_an_expansion_says_what_is_wrong_in_one_line(cli, make_run, calibrated, tmp_path):
    run = make_run("--max-params", "10")
    exported(cli, run, tmp_path / "tenant", "--format", "compact")
    arguments = ("expand", tmp_path / "tenant", "--out", tmp_path / "out", "--basis")
    assert "name a directory that qpa basis wrote" in cli.refuses(*arguments, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(calibrated, other)
    document = json.loads((other / "basis.json").read_text())
    (other / "basis.json").write_text(json.dumps(document))
    assert "with which tenant was trained" in cli.refuses(*arguments, other)
    content = (tmp_path / "tenant").read_bytes()
    (tmp_path / "tenant").write_bytes(content[:-1])
    assert "cut short" in cli.refuses(*arguments, calibrated)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def stories(assets, tmp_path_factory):
    """Return a real model, options of its data, and a basis of it."""
    model, text = assets / "models" / "stories260K", assets / "data" / "tinyshakespeare" / "input.txt"
    basis = tmp_path_factory.mktemp("stories") / "basis"
    basis.mkdir()
    calibrate(basis, InspectModel(str(model)), data=(str(text),), max_length=64, batches=1)
    return model, ("--data", text, "--max-length", "64", "--eval-share", "0.01", "--device", "cpu"), basis


@pytest.mark.assets
@pytest.mark.parametrize(
    ("n_trained", "n_bytes", "options"),
    [
        (49, 512, ("--max-params", "60")),
        (302, 2_000, ("--max-params", "302")),
        (600, 3_000, ("--generator", "state", "--features", "own", "--control-size", "599")),
        (4756, 20_000, ("--generator", "spectral", "--circuits", "4")),
    ],
)
def test_a_real_models_adapters_expand_to_the_same_bytes(cli, stories, tmp_path, n_trained, n_bytes, options):
    model, data, basis = stories
    run = tmp_path / "run"
    code, _, err = cli("plan", "--model", model, "--basis", basis, "--out", run, *options)
    assert code == 0, err
    assert RunDirectory(run).read(WeightLayout).account.n_generator == n_trained
    code, _, err = cli("train", run, *data, "--max-steps", 2)
    assert code == 0, err
    assert check_same_bytes(cli, run, basis, tmp_path) <= n_bytes
