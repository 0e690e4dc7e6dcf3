"""The demonstration's text and model come from seeds alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpa.documents import EngineCheck, FrozenAdapter
from qpa.passes.train_generator import TrainGenerator
from qpa.pipeline.configuration import read_configuration
from qpa.workflow.resolved import formats_of

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(autouse=True)
def _demo_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_texts_are_what_their_seed_says():
    from demo.texts import diary, telegrams

    telegram = "south wind calm Monday dawn stop trawlers near cave nine stop kettle silver cook oils stop"
    assert telegrams(0, 1) == f"{telegram} send island soup stop\n"
    assert diary(0, 1).startswith(
        "On Friday at midnight the wind is wild and comes from the north. We see four "
    )
    assert diary(0, 50) == diary(0, 50) != diary(1, 50)
    assert telegrams(0, 50) == telegrams(0, 50) != telegrams(1, 50)


def test_telegrams_use_the_words_of_the_diary():
    from demo.texts import diary, telegrams

    assert set(telegrams(0, 500).split()) <= set(diary(0, 3000).replace(".", "").split())


def test_the_texts_are_written_for_a_reader_who_follows_the_quick_start(tmp_path, monkeypatch, capsys):
    from demo import texts

    monkeypatch.setattr(sys, "argv", ["demo.texts", str(tmp_path / "texts")])
    texts.main()
    assert (tmp_path / "texts" / "telegrams.txt").read_text() == texts.telegrams(0, 3000)
    assert (tmp_path / "texts" / "telegrams-held-out.txt").read_text() == texts.telegrams(1, 200)
    assert capsys.readouterr().out.count("telegrams, the first: ") == 2


def test_two_builds_are_the_same_bytes(tmp_path):
    builds = [_start_build(tmp_path / hash_seed, hash_seed) for hash_seed in ("1", "2")]
    assert [build.wait(timeout=120) for build in builds] == [0, 0]
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "12")
    assert first == second
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= first.keys()


def _start_build(directory, hash_seed):
    arguments = (sys.executable, "-m", "demo.build_model", str(directory), "--steps", "3")
    return subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed})


@pytest.mark.parametrize(
    ("greedy", "eval_loss", "passed"),
    [((7, 8), 1.0, True), ((7, 9), 1.0, False), ((7, 8), 4.5, False)],
)
def test_the_demonstration_fails_on_other_tokens_or_a_worse_loss(monkeypatch, greedy, eval_loss, passed):
    from demo import table

    monkeypatch.setattr(table, "text_of", lambda tokens, _: str(tokens))
    frozen = FrozenAdapter.from_json((GOLDEN / "frozen-adapter-1/llama.json").read_bytes(), "llama.json")
    result = frozen.result.model_copy(update={"base_loss": 4.0, "eval_loss": eval_loss})
    frozen = frozen.model_copy(update={"result": result})
    checks = tuple(
        EngineCheck(
            engine=name,
            max_logit_difference=0.0,
            max_base_difference=1.0,
            greedy_tokens=tokens,
            greedy_tokens_equal=True,
            missing_keys=(),
            unexpected_keys=(),
        )
        for name, tokens in (("peft", (7, 8)), ("transformers", greedy))
    )
    assert table.summary(frozen, (1, 2), (7, 8), checks)[1] is passed
    assert table.summary(frozen, (1, 2), (7, 8), ())[1] is False


def test_the_demonstrations_configuration_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    configuration = read_configuration(Path("demo/telegrams.yaml"))
    assert (configuration.out, formats_of(configuration)) == (Path("runs/demo"), ("lora",))
    training = configuration.make(TrainGenerator)
    assert (training.max_steps, training.data) == (200, ("runs/demo-text/telegrams.txt",))
