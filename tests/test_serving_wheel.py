"""The distribution qpa-serve: what a serving machine installs."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks.random_compact import write_adapters, write_basis, write_layout
from qpa.serve.basis import Basis
from qpa.serve.expansion import expand
from tests.serving_wheel import ROOT, build_wheel

ENTRY_POINT = {"vllm.general_plugins": {"qpa": "qpa.serve.vllm_resolver:register"}}


def project(path: str) -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / path).read_text())["project"]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("serve") / "wheel")


def test_both_distributions_have_the_same_version_python_and_plugin_for_vllm():
    whole, alone = project("pyproject.toml"), project("serve/pyproject.toml")
    for name in ("version", "requires-python", "license"):
        assert whole[name] == alone[name]
    assert whole["entry-points"] == alone["entry-points"] == ENTRY_POINT
    assert set(alone["dependencies"]) <= set(whole["dependencies"])


def test_the_wheel_has_the_files_that_serve_and_asks_for_two_libraries(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        required = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "qpa" / "serve").glob("*.py")}
    expected |= {"qpa/errors.py", "qpa/store/atomic_files.py", "qpa/store/disk_space.py"}
    assert names == expected and len(names) > 12
    assert sorted(line.split(">")[0] for line in required or ()) == ["numpy", "safetensors"]


def test_it_expands_where_only_numpy_and_safetensors_are(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in ("numpy", "safetensors"):
        for file in distribution(name).files or ():
            top = Path(file.parts[0])
            if not (site / top).exists() and ".." not in file.parts:
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    basis = write_basis(tmp_path / "basis", {"model.layers.0.q_proj": (6, 5)})
    (file,) = write_adapters(tmp_path / "s", ["a"], basis, write_layout(tmp_path / "s", basis))
    script = (
        "import importlib.util, sys\n"
        "assert not any(map(importlib.util.find_spec, ('torch', 'qiskit', 'peft', 'pydantic', 'typer')))\n"
        "from qpa.serve.expansion import main\n"
        "import qpa.serve.cache, qpa.serve.resolution, qpa.serve.store, qpa.serve\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-S", "-c", script, str(file), str(basis.directory), str(tmp_path / "out")]
    variables = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    expand(file, Basis.open(basis.directory), tmp_path / "here")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
