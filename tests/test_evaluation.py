import math

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qpa.models.base_model import load_model
from qpa.training.evaluation import (
    count_tokens,
    digest_of_rows,
    evaluate,
    evaluate_rows,
    summed_token_loss,
)
from tests.ddp_worker import plan_adapter

LENGTHS = (3, 9, 2, 7, 12)


@pytest.fixture(scope="module")
def model(llama):
    return load_model(plan_adapter(llama)[0].base, keep_dtype=False)


def make_rows(n_masked=0):
    random = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 256, (length,), generator=random).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100] * n_masked + row[n_masked:]} for row in rows]


def pad_to(length, *, left=False):
    """Return a collator that pads every row with token 0 to one length."""

    def pad(values, filler):
        padding = [filler] * (length - len(values))
        return padding + values if left else values + padding

    def collate(rows):
        return {
            "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        }

    return collate


def unpadded(rows):
    (row,) = rows
    return {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}


def loss_by_hand(model, rows):
    """Sum -log p over the labelled tokens, one row and one token at a time."""
    total, n_tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"]):
            if position > 0 and label != -100:
                total += float(torch.logsumexp(logits[position - 1], 0) - logits[position - 1, label])
                n_tokens += 1
    return total / n_tokens, n_tokens


def run(model, rows, collate, *, batch_size=2, autocast_to=None, progress=lambda *_: None):
    return evaluate(
        model,
        rows,
        collate,
        batch_size=batch_size,
        autocast_to=autocast_to,
        progress=progress,
        description="evaluating",
    )


@pytest.mark.parametrize("n_masked", [0, 1, 2])
def test_the_loss_is_the_sum_by_hand(model, n_masked):
    rows = make_rows(n_masked)
    expected, n_tokens = loss_by_hand(model, rows)
    found = run(model, rows, unpadded, batch_size=1)
    assert found.n_tokens == n_tokens == sum(length - max(1, n_masked) for length in LENGTHS)
    assert found.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("collate", [pad_to(12), pad_to(40), pad_to(20, left=True)], ids=["12", "40", "left"])
def test_padding_and_batching_do_not_change_the_loss(model, batch_size, collate):
    rows = make_rows(n_masked=1)
    expected = run(model, rows, unpadded, batch_size=1)
    found = run(model, rows, collate, batch_size=batch_size)
    assert found.n_tokens == expected.n_tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_the_trainers_own_collator_changes_nothing(model):
    rows = make_rows()
    found = run(model, rows, DataCollatorForLanguageModeling(pad_token_id=0), batch_size=3)
    assert found.loss == pytest.approx(loss_by_hand(model, rows)[0], rel=1e-6)


def test_the_prompt_carries_no_loss(model):
    rows = [{"input_ids": list(range(1, 9)), "labels": [-100] * 5 + [6, 7, 8]}]
    other = [{"input_ids": list(range(1, 9)), "labels": [-100] * 4 + [5, 6, 7, 8]}]
    masked, more = run(model, rows, unpadded, batch_size=1), run(model, other, unpadded, batch_size=1)
    assert (masked.n_tokens, more.n_tokens) == (3, 4)
    assert masked.loss == pytest.approx(loss_by_hand(model, rows)[0], rel=1e-6)
    assert masked.loss != pytest.approx(more.loss, rel=1e-3)


def test_the_loss_is_weighted_by_tokens_not_by_rows(model):
    rows = make_rows()
    alone = [run(model, [row], unpadded, batch_size=1) for row in rows]
    total = sum(result.loss * result.n_tokens for result in alone)
    assert run(model, rows, pad_to(12)).loss == pytest.approx(total / sum(LENGTHS[i] - 1 for i in range(5)))


def test_a_split_without_labels_has_no_tokens(model):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}]
    assert run(model, rows, unpadded, batch_size=1) == (0.0, 0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_keeps_the_mode_and_makes_no_gradient(model, training):
    model.train(training)
    result = run(model, make_rows(), pad_to(12))
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert run(model, make_rows(), pad_to(12)) == result


def test_bfloat16_changes_the_loss_by_rounding_only(model):
    rows = make_rows()
    single, half = run(model, rows, pad_to(12)), run(model, rows, pad_to(12), autocast_to=torch.bfloat16)
    assert half.loss != single.loss
    assert half.loss == pytest.approx(single.loss, rel=0.02)


def test_progress_counts_rows(model):
    calls = []
    run(model, make_rows(), pad_to(12), progress=lambda *call: calls.append(call))
    assert calls == [("evaluating", 2, 5), ("evaluating", 4, 5), ("evaluating", 5, 5)]


# The parts


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    labels = torch.tensor([[3, 1, -100, 2], [-100, -100, 0, -100]])
    total = summed_token_loss(torch.zeros(2, 4, 7), labels)
    # The first label of a row has nothing before it: two tokens of the first row count, one of the second.
    assert count_tokens(labels) == 3
    assert float(total) == pytest.approx(3 * math.log(7))


def test_the_loss_is_float32_whatever_the_logits_are():
    labels = torch.tensor([[0, 1]])
    logits = torch.tensor([[[0.0, 1e-3], [0.0, 0.0]]], dtype=torch.bfloat16)
    total = summed_token_loss(logits, labels)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(math.log(1 + math.exp(-float(logits[0, 0, 1]))), rel=1e-6)


def test_the_digest_of_rows_sees_ids_labels_order_and_splits():
    first, second = {"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}
    digests = {
        digest_of_rows([first], [second]),
        digest_of_rows([second], [first]),
        digest_of_rows([first, second], []),
        digest_of_rows([], [first, second]),
        digest_of_rows([second, first], []),
        digest_of_rows([first | {"labels": [-100, 2]}], [second]),
        digest_of_rows([first | {"input_ids": [12]}], [second]),
        digest_of_rows([], []),
    }
    assert len(digests) == 8
    assert digest_of_rows([first], [second]) == digest_of_rows([dict(first)], [second | {"text": "x"}])
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


def test_the_losses_of_rows_are_those_of_each_alone_and_together_that_of_all(model):
    rows = make_rows(n_masked=2)
    found = evaluate_rows(model, rows, pad_to(12), batch_size=2, autocast_to=None)
    alone = [run(model, [row], unpadded, batch_size=1) for row in rows]
    assert found.weights.tolist() == [result.n_tokens for result in alone]
    expected = [result.loss * result.n_tokens for result in alone]
    assert found.sums.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.loss == pytest.approx(run(model, rows, pad_to(12)).loss, rel=1e-6)
