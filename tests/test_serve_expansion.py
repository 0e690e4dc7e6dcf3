"""Compact files with their layouts and basis: what is written, and everything that may be wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qpa.errors import DirectoryError, DocumentError, QpaError
from qpa.generators.canonical import layout_text
from qpa.serve.basis import Basis
from qpa.serve.compact import Compact
from qpa.serve.decoding import lengths
from qpa.serve.expansion import expand, groups_of, main, tensors
from qpa.serve.layout import Layout
from tests.serve_layouts import PLANS, SPEC, in_torch, trained, write_basis, write_compact

ROOT = Path(__file__).parents[1]
LAYOUTS = {name: json.loads(layout_text(trained(name)[0])) for name in PLANS}


@pytest.fixture
def basis(tmp_path):
    return write_basis(tmp_path / "basis")


@pytest.mark.parametrize("name", PLANS)
def test_what_is_written_is_the_canonical_decoding(name, basis, tmp_path):
    path = tmp_path / "store" / "tenant"
    path.parent.mkdir()
    layout, generator = write_compact(path, basis, name)
    expand(path, basis, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    directions = load_file(basis.arrays)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == basis.config_text
    assert [*found] == sorted(f"base_model.model.{tensor.path}" for tensor in SPEC.tensors)
    generator.double()
    for name_ in generator.basis_names:
        n_rows, n_columns = generator.basis(name_).shape
        generator.basis(name_).copy_(torch.from_numpy(directions[name_][:n_rows, :n_columns].copy()))
    for name_, tensor in in_torch(layout, generator).items():
        scale = 2.0 if "lora_B" in name_ else 1.0
        ours = found[f"base_model.model.{name_}"]
        assert np.abs(ours - scale * tensor.numpy()).max() < 1e-6 * max(1.0, float(tensor.abs().max()))
    streamed = dict(tensors(path, basis))
    assert [*streamed] == sorted(found) and all(np.array_equal(streamed[key], found[key]) for key in found)


def test_a_process_without_torch_expands_the_same_bytes(basis, tmp_path):
    path = tmp_path / "store" / "tenant"
    path.parent.mkdir()
    write_compact(path, basis, "spectral")
    expand(path, basis, tmp_path / "here")
    program = (
        "import sys\n"
        "for name in ('torch', 'pydantic', 'qiskit', 'transformers', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "from qpa.serve.expansion import main\n"
        f"sys.exit(main({[str(path), str(basis.directory), str(tmp_path / 'there')]}))\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_the_command_says_what_is_wrong_in_one_line(basis, tmp_path, capsys):
    path = tmp_path / "tenant"
    write_compact(path, basis)
    assert main([]) == 2
    assert main([str(path), str(basis.directory), str(tmp_path / "out")]) == 0
    assert main([str(path), str(basis.directory), str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "expected a new directory" in lines[1]


def test_another_basis_is_refused(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis)
    document = json.loads((basis.directory / "basis.json").read_text())
    (basis.directory / "basis.json").write_text(json.dumps(document, indent=1))
    with pytest.raises(DocumentError, match=r"expected the basis \w{12}\.\., with which tenant was trained"):
        expand(path, Basis.open(basis.directory), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bank_that_the_basis_does_not_have_is_refused(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis)
    found = Compact.read(path)
    path.write_bytes(Compact(found.basis, found.layout, False, found.arrays, bank=1).as_bytes())
    with pytest.raises(DocumentError, match="expected a bank of the basis, which has 1, found number 1"):
        expand(path, basis, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_basis_of_the_first_version_has_one_bank(basis, tmp_path):
    path = basis.directory / "basis.json"
    document = json.loads(path.read_text())
    (bank,) = document.pop("banks")
    path.write_text(json.dumps(document | {"schema": "qpa.basis/1", "calibration": bank}))
    old = Basis.open(basis.directory)
    assert len(old.banks) == 1
    compact = tmp_path / "tenant"
    write_compact(compact, old)
    expand(compact, old, tmp_path / "out")


def test_more_numbers_than_the_layout_has_are_refused(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis)
    found = Compact.read(path)
    for arrays in (
        (*found.arrays, np.ones(1, np.float32)),
        (np.ones(19, np.float32), *found.arrays[1:]),
        (),
    ):
        path.write_bytes(Compact(found.basis, found.layout, False, arrays).as_bytes())
        with pytest.raises(DocumentError, match=r"expected arrays of .* numbers, found"):
            expand(path, basis, tmp_path / "out")
    path.write_bytes(Compact(found.basis, found.layout, True, found.arrays).as_bytes())
    with pytest.raises(DocumentError, match="expected arrays of"):
        expand(path, basis, tmp_path / "out")


def test_a_layout_that_is_missing_or_edited_is_refused(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis)
    (layout,) = (tmp_path / "layouts").iterdir()
    layout.write_bytes(layout.read_bytes() + b" ")
    with pytest.raises(DocumentError, match="it was edited or damaged"):
        expand(path, basis, tmp_path / "out")
    layout.unlink()
    with pytest.raises(DocumentError, match="copy it from where tenant was exported"):
        expand(path, basis, tmp_path / "out")


def test_a_layout_of_another_model_is_refused(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis, "spectral")
    found = Compact.read(path)
    text = layout_text(trained("spectral")[0]).replace(b"layers.0.", b"layers.9.")
    digest = hashlib.sha256(text).digest()
    (tmp_path / "layouts" / f"{digest.hex()}.json").write_bytes(text)
    path.write_bytes(Compact(found.basis, digest, False, found.arrays).as_bytes())
    with pytest.raises(DocumentError, match="the layout is of another basis"):
        expand(path, basis, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_basis_whose_arrays_are_damaged_is_refused(basis):
    content = bytearray(basis.arrays.read_bytes())
    content[-1] ^= 1
    basis.arrays.write_bytes(content)
    with pytest.raises(DocumentError, match="it is damaged; copy the basis again"):
        Basis.open(basis.directory)
    basis.arrays.unlink()
    with pytest.raises(DocumentError, match="the basis's arrays, found No such file"):
        Basis.open(basis.directory)
    with pytest.raises(DocumentError, match="name a directory that qpa basis wrote"):
        Basis.open(basis.directory / "nowhere")


def test_what_stands_in_the_way_is_kept(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis)
    (tmp_path / "out").mkdir()
    with pytest.raises(DirectoryError, match="a new directory"):
        expand(path, basis, tmp_path / "out")
    assert [*(tmp_path / "out").iterdir()] == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DirectoryError, match="a directory that can be written"):
        expand(path, basis, tmp_path / "file" / "out")


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from(
        [10**30, 1.5, float("inf"), float("nan"), "x", "", [], {}, [0], [10**9], [[0]], {"a": 1}]
    ),
)


def places(content, at=()):
    """Return the paths of everything in a JSON object, a few of each long list."""
    found = [at] if at else []
    if isinstance(content, dict):
        for key in content:
            found += places(content[key], (*at, key))
    elif isinstance(content, list):
        for index in range(min(3, len(content))):
            found += places(content[index], (*at, index))
    return found


def with_value(content, place, value):
    changed = copy.deepcopy(content)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_layouts_give_one_line(basis, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(LAYOUTS)))
    place = data.draw(st.sampled_from(places(LAYOUTS[name])))
    content = json.dumps(with_value(LAYOUTS[name], place, data.draw(values))).encode()
    digest = hashlib.sha256(content).digest()
    (tmp_path / "layouts").mkdir(exist_ok=True)
    (tmp_path / "layouts" / f"{digest.hex()}.json").write_bytes(content)
    try:
        layout = Layout.parse("layout", content)
        arrays = tuple(np.ones(n, np.float32) for n in lengths(layout, are_probabilities=False))
        path = tmp_path / "tenant"
        path.write_bytes(Compact(basis.digest, digest, False, arrays).as_bytes())
        for _ in tensors(path, basis):
            pass
    except QpaError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_bases_give_one_line(tmp_path, data):
    directory = tmp_path / "basis"
    if not directory.exists():
        write_basis(directory)
        (tmp_path / "kept.json").write_bytes((directory / "basis.json").read_bytes())
    document = json.loads((tmp_path / "kept.json").read_text())
    place = data.draw(st.sampled_from(places(document)))
    content = json.dumps(with_value(document, place, data.draw(values)))
    (directory / "basis.json").write_text(content)
    try:
        assert Basis.open(directory).shapes
    except QpaError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"schema":"qpa.compact-layout/2"}', "[" * 100_000, "1e999"]
)
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(DocumentError, match="a layout that can be expanded"):
        Layout.parse("layout", text.encode())


def test_groups_are_read_once_and_tensors_one_at_a_time(basis, tmp_path):
    path = tmp_path / "tenant"
    write_compact(path, basis, "state")
    assert len(groups_of(path, basis)[0]) == 1
    first, tensor = next(tensors(path, basis))
    assert first.endswith("down_proj.lora_A.weight") and tensor.dtype == np.float32


@pytest.mark.parametrize(("place", "name"), [("ansatz", "n_layers"), ("features", "n_control")])
def test_a_layout_that_would_compute_for_days_is_refused(place, name):
    content = json.loads(json.dumps(LAYOUTS["state"]))
    content[place][name] = 1 << 31
    with pytest.raises(DocumentError, match="too many to expand"):
        Layout.parse("layout", json.dumps(content).encode())
