"""Features and tensors in numpy are those that training has, and the same bits in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qpa.errors import DocumentError
from qpa.generators.canonical import canonical_adapter, serve_layout, trained_numbers
from qpa.serve.features import KINDS, features_of, lengths_of
from tests.serve_layouts import PLANS, SPEC, in_torch, initial, trained

ROOT = Path(__file__).parents[1]


def digest(adapter):
    hashed = hashlib.sha256()
    for path in sorted(adapter):
        hashed.update(path.encode() + adapter[path].numpy().tobytes())
    return hashed.hexdigest()


def canonical(name):
    layout, generator = trained(name)
    return canonical_adapter(SPEC, layout, generator.state_dict(), initial(layout))


@pytest.mark.parametrize("name", PLANS)
def test_features_are_those_of_the_torch_modules(name):
    layout, generator = trained(name)
    small = serve_layout(layout)
    n = len(lengths_of(small, are_probabilities=False))
    kept = trained_numbers(layout, generator.state_dict())
    numbers = [array.astype(np.float64) for array in kept.arrays]
    found = features_of(small, numbers[:n], are_probabilities=False)
    expected = generator.features(generator.run()).detach().numpy()
    used = layout.states
    assert found.shape == expected.shape
    assert np.allclose(found[used], expected[used], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", PLANS)
def test_tensors_are_those_of_training_to_float32_rounding(name):
    layout, generator = trained(name)
    found, expected = canonical(name), in_torch(layout, generator.double())
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        assert float((found[path] - tensor).abs().max()) < 3e-7 * scale, path
    assert any(float(tensor.abs().max()) > 0.05 for path, tensor in found.items() if "lora_B" in path)


@pytest.mark.parametrize("name", ["state", "signed", "vectors", "spectral"])
def test_probabilities_stand_in_for_angles(name):
    layout, generator = trained(name)
    probabilities = generator.run().detach()
    arrays, first = generator.state_dict(), initial(layout)
    found = canonical_adapter(SPEC, layout, arrays, first, probabilities)
    expected = canonical_adapter(SPEC, layout, arrays, first)
    assert all(torch.allclose(found[path], expected[path], rtol=1e-4, atol=1e-5) for path in expected)


def test_the_bits_are_the_same_in_a_process_with_other_threads():
    program = (
        "from tests.test_serve_decoding import PLANS, canonical, digest\n"
        "print(*(digest(canonical(name)) for name in PLANS))"
    )
    threads = {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3", "PYTHONHASHSEED": "5"}
    environment = os.environ | threads | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [digest(canonical(name)) for name in PLANS]


def test_what_is_not_computed_here_is_refused_by_name():
    layout, generator = trained("own")
    other = layout.model_copy(update={"features": layout.features.model_copy(update={"kind": "network"})})
    with pytest.raises(DocumentError, match=r"features: expected circuit, .* or own, found network"):
        trained_numbers(other, generator.state_dict())
    assert set(KINDS) == {"constant", "log-linear", "tables", "own"}


def test_an_angle_beyond_the_reduction_is_refused():
    layout, generator = trained("state")
    arrays = generator.state_dict()
    arrays["chunk_features.angles"][0, 0] = 1e9
    with pytest.raises(DocumentError, match="the angles: expected numbers between -100,000 and 100,000"):
        canonical_adapter(SPEC, layout, arrays, initial(layout))


def test_a_number_that_is_not_finite_is_refused():
    layout, generator = trained("state")
    arrays = generator.state_dict()
    arrays["decoders.0.weights.0"][0, 0] = 3e38
    arrays["basis_1"][:] = 3e38
    with pytest.raises(DocumentError, match="expected finite numbers, found NaN or infinity"):
        canonical_adapter(SPEC, layout, arrays, initial(layout))


def test_imports_load_nothing_heavy():
    program = (
        "import sys, qpa.serve.expansion, qpa.serve.basis, qpa.serve.compact\n"
        "print([name for name in ('torch', 'pydantic', 'qiskit', 'ml_dtypes') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
