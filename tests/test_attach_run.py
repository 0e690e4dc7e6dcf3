"""A planned run under a loop of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpa.documents import WeightLayout
from qpa.errors import DocumentError
from qpa.generators.generator import GENERATORS
from qpa.training.attach_run import attach_run
from tests.test_train_generator import plan


def batches_of(model: Path, text: Path, n_batches: int) -> list[dict[str, torch.Tensor]]:
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: n_batches * 64].view(n_batches, 2, 32)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("layout", [{}, {"generator": "state"}])
def test_a_plain_loop_trains_what_the_run_planned(llama, text_file, tmp_path, layout) -> None:
    run = plan(llama, tmp_path / "run", inspect={"rank": 4}, circuits=None, layers=None, **layout)
    batches = batches_of(llama, text_file, 8)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    attached = attach_run(run.path, batches, device="cpu")
    spectrum_is_read = [tensor for tensor in attached.generator.buffers() if tensor.any()]
    assert spectrum_is_read
    (kind, rate) = (GENERATORS[run.read(WeightLayout).generator], attached.optimizer.param_groups[0]["lr"])
    assert attached.optimizer.angle_ratio == pytest.approx(kind.angle_ratio) and rate > 0
    with torch.no_grad():
        before = base(**batches[0]).loss
        assert torch.equal(attached.model(**batches[0]).loss, before)
    for batch in batches * 3:
        attached.model(**batch).loss.backward()
        attached.optimizer.step()
        attached.optimizer.zero_grad()
    with torch.no_grad():
        after = attached.model.eval()(**batches[0])
    assert after.loss < before
    attached.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded(**batches[0]).logits, after.logits)


def test_rates_of_the_caller_count(llama, text_file, tmp_path) -> None:
    run = plan(llama, tmp_path / "run", inspect={"rank": 4})
    optimizer = attach_run(run.path, batches_of(llama, text_file, 2), lr=1e-3, angle_lr=5e-4).optimizer
    assert (optimizer.param_groups[0]["lr"], optimizer.angle_ratio) == (1e-3, 0.5)


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(DocumentError, match="expected a run directory"):
        attach_run(tmp_path / "none", [])
