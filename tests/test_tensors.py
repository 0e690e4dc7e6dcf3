"""How documents name the tensors of an adapter, in all versions, and what roles mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qpa.adapters.registry import KINDS
from qpa.documents import TENSOR_RULES, AdapterSpec, FrozenAdapter, TensorRef
from tests.test_documents import seal

GOLDEN = Path(__file__).parent / "golden"
SPECS = sorted((GOLDEN / "adapter-spec-2").glob("*.json"))
PATHS = {
    "lora_A": "m.0.lora_A.weight",
    "lora_B": "m.0.lora_B.weight",
    "lora_embedding_A": "m.0.lora_embedding_A",
    "lora_embedding_B": "m.0.lora_embedding_B",
    "lora_magnitude_vector": "m.0.lora_magnitude_vector",
    "ia3_l": "m.0.ia3_l",
    "prefix_key": "m.0.prefix_key",
    "prefix_value": "m.0.prefix_value",
    "ffa_down": "m.0.ffa_down.weight",
    "ffa_up": "m.0.ffa_up.weight",
    "oft_R": "m.0.oft_R.weight",
    **{f"qtha_{side}_{site}": f"m.0.qtha_{side}_{site}" for side in ("down", "up") for site in range(3)},
    "qtha_angles": "m.0.qtha_angles",
    "qtha_fusion": "m.0.qtha_fusion",
}
"""The paths by which the arrays of every run so far name their tensors."""


def roles() -> set[str]:
    rules = [TENSOR_RULES[name] for name in TENSOR_RULES]
    return {role.name for rule in rules for role in (*rule.roles, *rule.roles_of_embedding)}


def test_the_paths_are_those_of_every_run_so_far() -> None:
    assert {TensorRef(module="m.0", role=role, shape=(2, 3)).path for role in roles()} == {*PATHS.values()}
    assert all(TensorRef(module="m.0", role=role, shape=(1, 1)).path == PATHS[role] for role in PATHS)


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_tensors_by_their_paths_become_modules_and_roles(file: Path) -> None:
    """Version 2 of a frozen adapter of any kind is read as what it was."""
    spec = AdapterSpec.from_json(file.read_bytes(), file.name)
    old = json.loads((GOLDEN / "frozen-adapter-2" / "llama.json").read_bytes())
    for field in ("method", "rank", "alpha", "target_modules", "fan_in_fan_out"):
        old[field] = json.loads(spec.to_json())[field]
    old["account"]["n_adapter"] = spec.n_numbers
    paths = [PATHS[tensor.role].replace("m.0", tensor.module) for tensor in spec.tensors]
    shapes = [list(tensor.shape) for tensor in spec.tensors]
    old["tensors"] = [{"path": path, "shape": shape} for path, shape in zip(paths, shapes, strict=True)]
    frozen = FrozenAdapter.from_json(seal(old), "file")
    assert frozen.tensors == tuple(tensor.ref for tensor in spec.tensors)
    assert [tensor.path for tensor in frozen.tensors] == paths


@pytest.mark.parametrize(
    ("role", "shape", "axis"),
    [
        ("lora_A", (4, 9), "row"),
        ("lora_B", (9, 4), "column"),
        ("lora_magnitude_vector", (9, 1), "column"),
        ("ia3_l", (9, 1), "column"),
        ("ia3_l", (1, 9), "row"),
        ("ffa_down", (4, 9), "row"),
        ("prefix_key", (4, 9), "row"),
        ("oft_R", (1, 9), "row"),
    ],
)
def test_vectors_are_rows_or_columns(role: str, shape: tuple[int, int], axis: str) -> None:
    tensor = TensorRef(module="m", role=role, shape=shape)
    assert (tensor.axis, tensor.vector_length, tensor.n_numbers) == (axis, 9, shape[0] * shape[1])
    assert tensor.n_vectors == min(shape)


@pytest.mark.parametrize("name", [*KINDS])
def test_a_kind_and_its_rules_are_of_one_name(name: str) -> None:
    assert KINDS[name].name == name and KINDS[name].rules is TENSOR_RULES[name]
    assert KINDS[name].title in KINDS[name].words(3) and KINDS[name].phrase(3).startswith(("a ", "an "))


def test_a_role_that_no_kind_has_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_C is not the role of any tensor"):
        TENSOR_RULES.role("lora_C")
