"""Packed rows: none is cut, none sees another one, and training on them is what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qpa.documents import FrozenAdapter, TrainedGenerator
from qpa.errors import OptionError
from qpa.training.data.data_options import DataOptions
from qpa.training.data.packing import LENGTHS, check_rows_apart, collate_packed, pack_rows
from qpa.training.data.splits import instruction_splits
from qpa.training.evaluation import count_row_tokens
from qpa.training.objectives.sft import SFT
from qpa.training.training_options import TrainingOptions
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train
from tests.tiny_models import (
    byte_tokenizer,
    tiny_gemma3,
    tiny_gpt2,
    tiny_gpt_neo,
    tiny_llama,
    tiny_mamba,
    tiny_opt,
    tiny_qwen3_moe,
)

LENGTH = 32


def rows_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Return rows of so many tokens, of which the first third has no label."""
    rows = []
    for number, length in enumerate(lengths):
        ids = [(7 * number + 3 * place) % 250 + 1 for place in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def unpacked(packed: list[dict[str, list[int]]]) -> list[list[int]]:
    """Return the token ids of all rows in packed ones."""
    found = []
    for row in packed:
        start = 0
        for length in row[LENGTHS]:
            found.append(row["input_ids"][start : start + length])
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"])
    return found


@given(st.lists(st.integers(1, 16), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_packed_rows_are_the_rows_in_another_order_and_carry_the_same_loss(lengths):
    rows = rows_of(lengths)
    packed = pack_rows(rows, 16)
    assert sorted(unpacked(packed)) == sorted(row["input_ids"] for row in rows)
    assert all(len(row["input_ids"]) <= 16 for row in packed)
    assert count_row_tokens(packed) == count_row_tokens(rows)
    assert sum(label != -100 for row in packed for label in row["labels"]) == count_row_tokens(rows)
    assert pack_rows(rows, 16) == packed


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_gpt2, tiny_gpt_neo, tiny_qwen3_moe])
def test_a_packed_row_is_answered_as_it_is_alone(make, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "model")).eval()
    check_rows_apart(model)
    check_rows_apart(model, bf16=True)
    packed = pack_rows(rows_of([5, 9, 3, 12, 7, 2, 16, 4]), 16)
    assert any(len(row[LENGTHS]) > 2 for row in packed)
    batch = collate_packed(packed, 0)
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        for found, row in zip(logits, packed, strict=True):
            start = 0
            for length in row[LENGTHS]:
                ids = torch.tensor([row["input_ids"][start : start + length]])
                alone = model(input_ids=ids, use_cache=False).logits[0]
                torch.testing.assert_close(found[start : start + length], alone, rtol=1e-4, atol=1e-4)
                start += length


@pytest.mark.parametrize("make", [tiny_opt, tiny_mamba])
def test_a_model_whose_rows_see_one_another_is_refused(make, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "model")).train()
    with pytest.raises(
        OptionError, match=r"^packing: .* found one that lets rows see one another; train without"
    ):
        check_rows_apart(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_takes_no_positions_is_refused():
    class Deaf(torch.nn.Module):
        """A model of words alone."""

        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(20, 4)

        def get_input_embeddings(self):
            return self.words

        def forward(self, input_ids, use_cache):
            return self.words(input_ids)

    with pytest.raises(OptionError, match="found Deaf, which takes no position ids"):
        check_rows_apart(Deaf())


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """Return a file of prompts with completions of different lengths."""
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    rows = [{"prompt": f"{n} plus {n}?", "completion": f" {n + n}{'!' * (n % 5)}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loss_of_packed_rows_is_that_of_the_rows(llama, answers):
    splits = {}
    for packing in (False, True):
        options = TrainingOptions(data=(str(answers),), max_length=LENGTH, packing=packing)
        splits[packing] = instruction_splits(options, byte_tokenizer(), 0)
    assert splits[True].evaluation == splits[False].evaluation
    assert len(splits[True].training) < len(splits[False].training) / 1.5
    summary = splits[True].summary.training
    assert (summary.n_rows, summary.n_unpacked) == (len(splits[True].training), len(splits[False].training))
    model = AutoModelForCausalLM.from_pretrained(llama)
    losses = []
    for packing in (False, True):
        options = TrainingOptions(data=(str(answers),), max_length=LENGTH, packing=packing)
        losses.append(SFT(options, byte_tokenizer()).calibration_loss(model, splits[packing].training).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "ia3", "ffa"])
def test_a_packed_training_lowers_the_loss_and_resumes_to_the_same_bits(
    llama, answers, tmp_path, monkeypatch, method
):
    options = {"packing": True, "max_steps": 4, "save_steps": 2}
    layout = {} if method == "lora" else {"generator": "aligned"}
    plain, whole, halved = (
        plan(
            llama,
            tmp_path / name,
            inspect={"method": method, **({} if method != "ia3" else {"rank": None})},
            **layout,
        )
        for name in ("plain", "whole", "halved")
    )
    frozen = train(whole, answers, **options)
    assert frozen.result.eval_loss < frozen.result.base_loss
    assert frozen.result.base_loss == train(plain, answers, max_steps=1).result.base_loss
    assert (
        whole.read(TrainedGenerator).data.training.n_rows < plain.read(TrainedGenerator).data.training.n_rows
    )
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(halved, answers, **options)
    monkeypatch.undo()
    train(halved, answers, **options, resume=True)
    assert same_bits(tensors(whole), tensors(halved))
    assert whole.read(FrozenAdapter) == halved.read(FrozenAdapter)


def test_a_prefix_that_all_rows_see_is_refused(llama, answers, tmp_path):
    run = plan(llama, tmp_path / "run", inspect={"method": "prefix"}, generator="aligned")
    with pytest.raises(
        OptionError, match="packing: expected a model and an adapter that keep packed rows apart"
    ):
        train(run, answers, packing=True)
    assert not run.has(TrainedGenerator)


def test_blocks_of_a_text_may_be_packed_too(text_file):
    options = DataOptions((str(text_file),), max_length=LENGTH, packing=True)
    packed = instruction_splits(options, byte_tokenizer(), 0)
    whole = instruction_splits(DataOptions((str(text_file),), max_length=LENGTH), byte_tokenizer(), 0)
    assert sorted(unpacked(packed.training)) == sorted(row["input_ids"] for row in whole.training)
