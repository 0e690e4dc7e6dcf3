"""Preferences: a tiny model learns which of two answers is preferred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from qpa.documents import FrozenAdapter
from qpa.errors import DataError
from qpa.exporters.formats.lora import ExportLora
from qpa.models.base_model import load_tokenizer
from qpa.pipeline.pass_protocol import PassContext
from qpa.report.facts import frozen_rows
from qpa.store.run_directory import METRICS, RunDirectory
from qpa.training import session as module
from qpa.training.objectives.dpo import DPO
from qpa.training.preparation import Session
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

DPO_OPTIONS: dict[str, Any] = {"objective": "dpo", "max_steps": 16, "max_length": 64, "lr": 2e-2}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 24 questions; the answer that repeats the number is preferred."""
    rows = [{"prompt": f"say {n}: ", "chosen": f"{n} yes", "rejected": f"{n} no."} for n in range(24)]
    return write(tmp_path_factory.mktemp("dpo") / "preferences.jsonl", rows)


def lines_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(llama: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = plan(llama, tmp_path_factory.mktemp("dpo") / "run")
    train(run, preferences, **DPO_OPTIONS, log_steps=4)
    return run


def test_the_preferred_answers_become_more_likely(trained: RunDirectory) -> None:
    result = trained.read(FrozenAdapter).result
    assert result.objective == "dpo"
    assert result.base_loss == pytest.approx(0.693147, abs=1e-6)  # log 2: nothing has changed yet
    assert result.eval_loss < 0.6
    accuracy, margin = result.scores
    assert (accuracy.name, accuracy.base, accuracy.adapted) == ("accuracy", 0.5, 1.0)
    assert (margin.name, margin.base) == ("margin", 0.0) and margin.adapted > 0.1
    first, *lines, last = lines_of(trained)
    assert first["eval_accuracy"] == 0.5 and last["eval_accuracy"] == 1.0
    assert "eval_perplexity" not in first
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert lines[-1]["accuracy"] > 0.9 and lines[-1]["margin"] > lines[0]["margin"]


def test_tables_and_card_say_what_was_trained_for(trained: RunDirectory, tmp_path: Path) -> None:
    documents = trained.read_through(FrozenAdapter)
    rows = dict(frozen_rows(documents))
    assert "base loss, perplexity" not in rows
    assert rows["accuracy before, after"] == "0.5000  1.0000"
    ExportLora().emit(documents[-1], tmp_path / "lora", PassContext(0, trained.files, documents))
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| accuracy | 0.5000 | 1.0000 |" in card and "perplexity" not in card


def test_the_loss_is_that_of_trl(
    llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainer, with the same reference, on the same pairs and the same adapter."""
    from trl import DPOConfig, DPOTrainer

    seen: list[tuple[list[float], list[float]]] = []
    original = module.record

    def compare(session: Session, *rest: Any) -> Any:
        model = session.adapted.model
        objective = session.objective
        assert isinstance(objective, DPO)
        rows = session.splits.evaluation
        with torch.no_grad():
            own = objective.judge(model.eval(), objective.collate(rows))
        tokenizer = load_tokenizer(session.context.documents[0].base)  # type: ignore[attr-defined]
        names = ("prompt", "chosen", "rejected")
        texts = [[tokenizer.decode(row[f"{n}_ids"], skip_special_tokens=True) for n in names] for row in rows]
        data = Dataset.from_list([dict(zip(names, text, strict=True)) for text in texts])
        settings = DPOConfig(
            str(tmp_path / "trl"),
            beta=0.1,
            max_length=64,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            per_device_eval_batch_size=len(rows),
            precompute_ref_log_probs=False,
            dataset_num_proc=None,
        )
        trainer = DPOTrainer(
            model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )
        for (
            name,
            parameter,
        ) in model.named_parameters():  # its reference is the adapter as it is: take the base
            if ".ref." in name and "lora_B" in name:
                parameter.data.zero_()
        found = trainer.evaluate()
        seen.append(
            (
                [float(own.losses.mean()), float(own.margins.mean())],
                [found["eval_loss"], found["eval_rewards/margins"]],
            )
        )
        model.delete_adapter("ref")
        return original(session, *rest)

    monkeypatch.setattr(module, "record", compare)
    train(plan(llama, tmp_path / "run"), preferences, **DPO_OPTIONS)
    ((own, found),) = seen
    assert own == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"keep_best": True, "eval_steps": 3, "grad_accum": 2}], ids=str)
def test_it_is_resumed_to_the_same_bits_and_lines(
    gpt2: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = {**DPO_OPTIONS, "max_steps": 8, "save_steps": 2, "log_steps": 3, **options}
    whole, halved = plan(gpt2, tmp_path / "whole"), plan(gpt2, tmp_path / "halved")
    train(whole, preferences, **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(halved, preferences, **options)
    train(halved, preferences, **options, resume=True)
    assert same_bits(tensors(whole), tensors(halved))
    assert (halved.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()


@pytest.mark.parametrize("method", ["ffa", "prefix"])
def test_adapters_that_trl_leaves_out_learn_too(
    llama: Path, preferences: Path, tmp_path: Path, method: str
) -> None:
    run = plan(llama, tmp_path / "run", inspect={"method": method, "rank": 4}, circuits=None, layers=None)
    result = train(run, preferences, **DPO_OPTIONS | {"lr": None}).result
    assert result.eval_loss < result.base_loss
    assert result.scores[0].adapted > result.scores[0].base


def test_conversations_are_preferences_too(llama: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {n}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no."}],
        }
        for n in range(12)
    ]
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    run = plan(llama, tmp_path / "run")
    data = write(tmp_path / "chats.jsonl", rows)
    result = train(run, data, **DPO_OPTIONS, chat_template=str(template)).result
    assert result.eval_loss < result.base_loss


def test_data_without_preferences_is_refused(llama: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(DataError, match="chosen"):
        train(plan(llama, tmp_path / "run"), data, **DPO_OPTIONS)


def test_accuracy_is_a_half_where_nothing_moved() -> None:
    from qpa.training.objectives.dpo import Judged

    judged = Judged(torch.zeros(3), torch.tensor([0.5, 0.0, -2.0]))
    assert judged.accuracies().tolist() == [1.0, 0.5, 0.0]
