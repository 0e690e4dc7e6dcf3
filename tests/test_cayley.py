"""Cayley rotations: orthogonal, PEFT's own, and merged as the live model turns its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpa.adapters.cayley import KIND, n_angles
from qpa.adapters.rotated_model import rotations
from qpa.adapters.weight_change import WeightChange
from qpa.errors import ExportError, OptionError
from qpa.exporters.contracts.export import check_contract
from qpa.exporters.formats.merged import ExportMerged
from qpa.exporters.formats.peft import ExportPeft
from qpa.models.base_model import load_model
from qpa.models.linear_layers import Layer
from tests.random_adapter import RandomAdapter, random_adapter
from tests.test_adapter_kinds import LFM2, inspect
from tests.test_export_kinds import write_model
from tests.test_export_onnx import PROMPT, difference, live_logits

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def blocks_by_hand(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Return (I - Q) (I + Q)^-1 of every block, with an inverse, from the numbers above the diagonal of Q."""
    blocks = []
    for row in numbers.reshape(-1, n_angles(size)):
        skew, values = torch.zeros(size, size, dtype=numbers.dtype), iter(row)
        for i in range(size):
            for j in range(i + 1, size):
                skew[i, j] = next(values)
                skew[j, i] = -skew[i, j]
        identity = torch.eye(size, dtype=numbers.dtype)
        blocks.append((identity - skew) @ torch.linalg.inv(identity + skew))
    return torch.stack(blocks)


@pytest.mark.parametrize("size", [2, 3, 4, 16])
def test_blocks_are_orthogonal_whatever_the_numbers(size):
    torch.manual_seed(size)
    numbers = 10 ** torch.linspace(-6, 3, 7, dtype=torch.float64)[:, None] * torch.randn(7, n_angles(size))
    turned = rotations(numbers, size)
    identity = torch.eye(size, dtype=torch.float64).expand(7, size, size)
    torch.testing.assert_close(turned @ turned.mT, identity, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(turned[:4], blocks_by_hand(numbers, size)[:4], atol=1e-12, rtol=1e-9)
    assert torch.equal(rotations(torch.zeros(7, n_angles(size)), size), identity.float())


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    numbers = torch.randn(2, n_angles(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda numbers: rotations(numbers, 3), numbers)


def test_layers_that_a_mixer_may_use_without_a_call_are_left_out(tmp_path):
    AutoModelForCausalLM.from_config(LFM2).save_pretrained(tmp_path)
    spec = inspect(tmp_path, "cayley")
    assert not any(".conv." in tensor.module for tensor in spec.tensors)
    left_out = {left.layers for left in spec.left_out if "beside a convolution" in left.reason}
    assert left_out == {"model.layers.*.conv.in_proj", "model.layers.*.conv.out_proj"}


def layers(*n_inputs: int) -> dict[str, Layer]:
    return {f"layer{n}": Layer(n, 8) for n in n_inputs}


@pytest.mark.parametrize(
    ("n_inputs", "asked", "found"),
    [((64, 172), None, 4), ((64, 172), 2, 2), ((6,), None, 3), ((25, 5), None, 5), ((512,), 64, 64)],
)
def test_blocks_divide_the_inputs_of_every_layer(n_inputs, asked, found):
    assert KIND.check_rank(layers(*n_inputs), asked) == found


def test_layers_without_a_common_divisor_are_refused():
    with pytest.raises(
        OptionError, match=r"^targets: expected layers whose inputs have a common .*, found 4 and 9"
    ):
        KIND.check_rank(layers(9, 4), None)


@given(
    n_blocks=st.integers(1, 4), size=st.integers(2, 5), n_others=st.integers(1, 6), n_rows=st.integers(1, 3)
)
@settings(deadline=None)
def test_rows_and_columns_are_turned_alike_however_they_are_cut(n_blocks, size, n_others, n_rows):
    random = np.random.default_rng(0)
    turn = random.normal(size=(n_blocks, size, size)).astype(np.float32)
    weight = random.normal(size=(n_blocks * size, n_others)).astype(np.float32)
    whole = np.zeros((n_blocks * size, n_blocks * size), np.float32)
    for n in range(n_blocks):
        whole[n * size : (n + 1) * size, n * size : (n + 1) * size] = turn[n]
    change, step = WeightChange(row_turn=turn), n_rows * size
    assert change.n_rows_together == size
    parts = [slice(start, start + step) for start in range(0, len(weight), step)]
    by_rows = np.concatenate([change.apply("w", rows, weight[rows]) for rows in parts])
    np.testing.assert_allclose(by_rows, whole @ weight, atol=1e-5)
    by_columns = WeightChange(column_turn=turn.swapaxes(1, 2)).apply("w", slice(None), weight.T)
    np.testing.assert_allclose(by_columns, by_rows.T, atol=1e-5)


MADE = [(name, method) for name in ("llama", "gpt2", "opt") for method in ("cayley", "cayley-shared")]


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a random rotation on Linear, and on Conv1D, without and with biases."""
    work, (name, method) = tmp_path_factory.mktemp("cayley"), request.param
    return random_adapter(write_model(name, work / "model"), work / "store", method=method)


def whole(made: RandomAdapter, module: str, *, n_inputs: int) -> torch.Tensor:
    """Return float64[n_inputs, n_inputs], the R of a module; one block stands for all."""
    blocks = blocks_by_hand(made.tensors[f"{module}.oft_R.weight"].double(), 4)
    assert len(blocks) == (1 if made.frozen.method == "cayley-shared" else n_inputs // 4)
    return torch.block_diag(*blocks.expand(n_inputs // 4, 4, 4))


def base_of(made: RandomAdapter) -> Any:
    return load_model(made.frozen.base, keep_dtype=False)


@pytest.mark.parametrize("block", [1 << 18, 7 * 64])
def test_a_merged_weight_is_turned_on_its_input_side(made, tmp_path, monkeypatch, block):
    monkeypatch.setattr("qpa.exporters.formats.merged._BLOCK", block)
    ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found, base = merged.state_dict(), base_of(made).state_dict()
    for module in made.frozen.modules:
        weight = base[f"{module}.weight"].double()
        turn = whole(made, module, n_inputs=weight.shape[0 if made.frozen.fan_in_fan_out else 1])
        expected = turn @ weight if made.frozen.fan_in_fan_out else weight @ turn.T
        torch.testing.assert_close(found[f"{module}.weight"].double(), expected, atol=1e-6, rtol=0)
    changed = {key for key in found if not torch.equal(found[key], base[key])}
    assert changed == {f"{module}.weight" for module in made.frozen.modules}
    with torch.no_grad():
        assert difference(merged(input_ids=PROMPT[None]).logits[0], live_logits(made)) <= 1e-5


def test_peft_loads_the_live_model_and_has_none_on_conv1d(made, tmp_path):
    out = tmp_path / "out"
    if made.frozen.fan_in_fan_out:
        words = (
            "^`format` peft: expected linear layers, found Conv1D, on which PEFT has no OFT; use merged or"
        )
        with pytest.raises(ExportError, match=words):
            ExportPeft().emit(made.frozen, out, made.context)
        assert not out.exists()
        return
    ExportPeft().emit(made.frozen, out, made.context)
    assert check_contract(out) == ()
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base_of(made), out).eval()
        found = difference(loaded(input_ids=PROMPT[None]).logits[0], live_logits(made))
    assert found <= (1e-5 if made.frozen.method == "cayley-shared" else 0.0)
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (out, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert PeftConfig.from_pretrained(out) == PeftConfig.from_pretrained(tmp_path / "theirs")


def test_a_bfloat16_base_starts_as_it_was_and_turns_in_float32(tmp_path):
    """Under autocast, too, where a product in bfloat16 would lose what a small rotation changes."""
    base = write_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    still = random_adapter(base, tmp_path / "still", method="cayley", scale=0)
    for model, cast in ((still.live.bfloat16(), False), (still.live.float(), True)):
        for numbers in (p for name, p in model.named_parameters() if "oft_R" in name):
            numbers.data = numbers.data.float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found = model(input_ids=PROMPT[None]).logits
            with model.disable_adapter():
                assert torch.equal(found, model(input_ids=PROMPT[None]).logits)
    made = random_adapter(base, tmp_path / "made", method="cayley")
    ExportMerged(dtype="bfloat16").emit(made.frozen, tmp_path / "out", made.context)
    found, stored = (load_file(path / "model.safetensors") for path in (tmp_path / "out", base))
    for module in made.frozen.modules:
        weight = stored[f"{module}.weight"].double()
        exact = weight @ whole(made, module, n_inputs=weight.shape[1]).T
        error = (found[f"{module}.weight"].double() - exact).abs()
        assert bool((error <= exact.abs() * 2.0**-8 + 1e-6).all()), module


def test_a_tied_head_is_turned_live_and_not_merged(gpt2, tmp_path):
    made = random_adapter(gpt2, tmp_path / "store", method="cayley", targets=("lm_head",))
    with torch.no_grad(), made.live.disable_adapter():
        base = made.live(input_ids=PROMPT[None]).logits[0]
    assert difference(base, live_logits(made)) > 1e-3
    with pytest.raises(ExportError, match="a weight of its own to merge into"):
        ExportMerged().emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()
