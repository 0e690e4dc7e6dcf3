"""Streaming safetensors against the library's own, byte for byte."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from qpa.errors import DocumentError
from qpa.store.atomic_files import sha256_of
from qpa.store.tensor_file import DTYPES, TensorFile, TensorPlan, write_tensors

TYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL")


@st.composite
def tensor_sets(draw):
    names = draw(st.lists(st.text("abc._é", min_size=1, max_size=8), max_size=6, unique=True))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors = {}
    for name in names:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        dtype = DTYPES[draw(st.sampled_from(TYPES))]
        tensors[name] = np.asarray(random.integers(0, 2, shape)).astype(dtype)
    return tensors


def plans_of(tensors):
    types = {dtype: name for name, dtype in DTYPES.items()}
    return [TensorPlan(name, types[array.dtype], array.shape) for name, array in tensors.items()]


@given(tensor_sets(), st.sampled_from([None, {"format": "pt"}]))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_what_the_library_writes(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    written = write_tensors(path, plans_of(tensors), tensors.__getitem__, metadata)
    assert (written.sha256, written.n_bytes) == (sha256_of(path), path.stat().st_size)
    file = TensorFile.open(path)
    assert file.metadata == (metadata or {})
    assert file.entries.keys() == tensors.keys()
    for name, array in tensors.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
    if tensors.keys() and all(array.dtype != ml_dtypes.bfloat16 for array in tensors.values()):
        assert {name: a.tobytes() for name, a in load_file(path).items()} == {
            name: a.tobytes() for name, a in tensors.items()
        }


@given(tensor_sets())
@settings(max_examples=40, deadline=None)
def test_files_of_one_type_have_the_librarys_bytes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    same = {name: array.astype(np.float32) for name, array in tensors.items()}
    write_tensors(path, plans_of(same), same.__getitem__, {"format": "pt"})
    assert path.read_bytes() == save(same, metadata={"format": "pt"})


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path):
    plan = TensorPlan("a", "F32", (2, 3))
    for array in (np.zeros((3, 2), np.float32), np.zeros((2, 3))):
        with pytest.raises(DocumentError, match=r"^a: expected F32\[2, 3\], found"):
            write_tensors(tmp_path / "x", [plan], lambda name, array=array: array)


def test_reading_does_not_change_the_file_when_the_array_is_changed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, [TensorPlan("a", "F32", (2,))], lambda name: np.ones(2, np.float32))
    before = path.read_bytes()
    TensorFile.open(path).read("a")[:] = 5
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "[:12]])
def test_what_is_no_safetensors_file_is_one_error(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match="a whole safetensors file"):
        TensorFile.open(path)
    with pytest.raises(DocumentError, match="a whole safetensors file"):
        TensorFile.open(Path(tmp_path / "missing"))
