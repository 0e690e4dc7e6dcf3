"""The data of a training, read again to score what counts give, with all options of the data."""

from __future__ import annotations

import json
import shutil

import pytest

from qpa.documents import FrozenAdapter, TrainedGenerator
from qpa.errors import DataError
from qpa.passes import freezing_pipeline
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.pipeline.pass_protocol import PassContext
from tests.chat_styles import LLAMA_3, STYLES
from tests.test_data_sources import COMMIT, kept, own_cache  # noqa: F401
from tests.test_train_generator import plan, train


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama):
    """Return a directory with a model without a chat template, conversations and a template, and a run."""
    path = tmp_path_factory.mktemp("place")
    shutil.copytree(llama, path / "llama")
    STYLES["llama-3"].tokenizer("").save_pretrained(path / "llama")
    (path / "template.jinja").write_text(LLAMA_3)
    (path / "other.jinja").write_text(LLAMA_3.replace("'<|eot_id|>'", "'!<|eot_id|>'"))
    lines = (
        {"said": [{"role": "user", "content": f"{n} legs?"}, {"role": "assistant", "content": f"{n + n}."}]}
        for n in range(40)
    )
    (path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"columns": ("said=messages",), "packing": True, "eval_share": 0.2, "loss_on": "completion"}
    template = str(path / "template.jinja")
    run = plan(path / "llama", path / "run")
    train(run, path / "chats.jsonl", max_steps=2, max_length=128, chat_template=template, **options)
    return path, run


def freeze(place, **options):
    path, run = place
    documents = run.read_through(TrainedGenerator)
    context = PassContext(0, run.files, documents)
    step = FreezeAdapter(data=(str(path / "chats.jsonl"),), **options)
    measure = MeasureCircuit(source="shots", shots=100_000)
    return freezing_pipeline(measure, step).run(documents[-1], context, run.write).document(FrozenAdapter)


def test_an_adapter_of_counts_is_scored_on_the_rows_of_the_training(place):
    path, run = place
    found = freeze(place, chat_template=str(path / "template.jinja"))
    assert found.frozen_loss == pytest.approx(found.result.eval_loss, abs=0.05)
    assert run.read(TrainedGenerator).data.evaluation.n_rows == 8


def test_another_chat_template_is_told_from_other_data(place):
    path, _ = place
    with pytest.raises(DataError, match="found another chat template; give its `chat_template` too"):
        freeze(place, chat_template=str(path / "other.jinja"))
    with pytest.raises(DataError, match="a chat template for messages, found none in the tokenizer"):
        freeze(place)
    template, others = str(path / "template.jinja"), path / "others.jsonl"
    others.write_text((path / "chats.jsonl").read_text().replace("legs", "eyes"))
    with pytest.raises(
        DataError, match=r"chats\.jsonl: expected the data of the training, found other data$"
    ):
        freeze(place, eval_data=(str(others),), chat_template=template)


def test_the_commit_of_a_dataset_of_the_hub_is_kept_in_the_run(llama, tmp_path, kept):  # noqa: F811
    run = plan(llama, tmp_path / "run")
    train(run, "somebody/talks", max_steps=1)
    (hub,) = run.read(TrainedGenerator).data.hub
    assert (hub.name, hub.revision) == ("somebody/talks", COMMIT)
