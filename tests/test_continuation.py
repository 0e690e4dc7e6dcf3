"""Base model and adapted model continue the same prompts, with every kind of adapter."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from qpa.documents import AdapterSpec, DataSummary, TrainedGenerator
from qpa.errors import ModelError, OptionError
from qpa.models.probe import N_NEW, greedy_continuation
from qpa.passes.inspect_model import InspectModel
from qpa.training.continuation import ContinuePrompts
from tests.random_adapter import RandomAdapter, random_adapter
from tests.test_documents import GOLDEN
from tests.tiny_models import tiny_gpt2, tiny_llama

# peft asks transformers by a name that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
]

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def made(model: Path, store: Path, method: str = "lora") -> tuple[RandomAdapter, AdapterSpec]:
    adapter = random_adapter(model, store, method=method)
    rank = None if method == "ia3" else 4
    return adapter, InspectModel(model=str(model), method=method, rank=rank).run(None, adapter.context)


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> tuple[RandomAdapter, AdapterSpec]:
    return made(llama, tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", method) for method in ("lora", "dora", "ia3", "prefix", "ffa")]
    + [("gpt2", method) for method in ("lora", "prefix")],
)
def test_greedy_tokens_are_those_of_the_live_model(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, method: str
) -> None:
    model = request.getfixturevalue(name)
    adapter, spec = made(model, tmp_path, method)
    files = adapter.context.files
    probe = load_file(files.get(adapter.frozen.probe))
    prompt = probe["input_ids"]
    with adapter.live.disable_adapter():
        base = greedy_continuation(adapter.live, prompt)
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = ContinuePrompts(max_new_tokens=N_NEW, device="cpu")
    (found,) = options((spec, adapter.frozen), files, [prompt.tolist()])
    whole = tokenizer.decode(prompt)
    assert found.prompt == whole
    assert whole + found.base == tokenizer.decode([*prompt, *base])
    assert whole + found.adapted == tokenizer.decode([*prompt, *probe["greedy"]])
    assert found.base != found.adapted


def test_a_prompts_continuation_depends_on_no_other_and_draws_are_seeded(lora) -> None:
    adapter, spec = lora
    documents, files = (spec, adapter.frozen), adapter.context.files
    greedy = ContinuePrompts(max_new_tokens=8, device="cpu")
    assert greedy(documents, files, ["a", "bcd"])[1] == greedy(documents, files, ["bcd"])[0]
    drawn = replace(greedy, temperature=1.5, seed=3)
    first = drawn(documents, files, ["bcd"])
    assert first == drawn(documents, files, ["bcd"])
    assert first != replace(drawn, seed=4)(documents, files, ["bcd"])
    # Close to temperature 0 the most probable token is as good as certain.
    assert replace(drawn, temperature=1e-4)(documents, files, ["bcd"]) == greedy(documents, files, ["bcd"])


def test_of_the_models_settings_only_the_end_counts(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    adapter, spec = made(model, tmp_path / "store")
    documents, files = (spec, adapter.frozen), adapter.context.files
    options = ContinuePrompts(max_new_tokens=8, device="cpu")
    (free,) = options(documents, files, ["abc"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    letter = next(letter for letter in free.adapted if letter.isascii())
    (end,) = tokenizer.encode(letter)
    GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, end], repetition_penalty=9.0, do_sample=True, min_p=0.5
    ).save_pretrained(model)
    (ended,) = options(documents, files, ["abc"])
    assert ended.adapted == free.adapted[: free.adapted.index(letter) + 1] != free.adapted


def test_a_message_is_written_in_the_chat_template(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    adapter, spec = made(model, tmp_path / "store")
    documents, files = (spec, adapter.frozen), adapter.context.files
    chat = ContinuePrompts(max_new_tokens=8, device="cpu", chat=True)
    with pytest.raises(ModelError, match="a chat template in the tokenizer"):
        chat(documents, files, ["Hi"])
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    (given,) = replace(chat, chat_template=str(template))(documents, files, ["Hi"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    (found,) = chat(documents, files, ["Hi"])
    assert found == given
    (plain,) = replace(chat, chat=False)(documents, files, ["<user>Hi<assistant>"])
    assert (found.prompt, found.base, found.adapted) == ("Hi", plain.base, plain.adapted)


def test_a_training_on_messages_asks_for_its_own_template(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    adapter, spec = made(model, tmp_path / "store")
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    text = (GOLDEN / "trained-generator-3" / "noisy.json").read_bytes()
    trained = TrainedGenerator.from_json(text, "golden")
    digest = "sha256:" + hashlib.sha256(TEMPLATE.encode()).hexdigest()
    chat = ContinuePrompts(max_new_tokens=2, device="cpu", chat=True, chat_template=str(template))
    for used, is_same in ((digest, True), ("sha256:0", False)):
        data = DataSummary.model_construct(chat_template=used)
        documents = (spec, trained.model_copy(update={"data": data}), adapter.frozen)
        with nullcontext() if is_same else pytest.raises(OptionError, match="the chat template of the tr"):
            assert chat(documents, adapter.context.files, ["Hi"])


@pytest.mark.parametrize(
    ("options", "prompt", "error"),
    [
        ({}, "", "prompt: expected at least one token"),
        ({}, "\udc80", "prompt: expected text in UTF-8"),
        ({"max_new_tokens": 512}, "abc", "max_new_tokens: expected at most 5"),
        ({"temperature": -1.0}, "abc", "temperature: "),
    ],
)
def test_what_cannot_be_continued_is_refused(lora, options, prompt, error) -> None:
    adapter, spec = lora
    with pytest.raises(OptionError, match=error):
        ContinuePrompts(device="cpu", **options)((spec, adapter.frozen), adapter.context.files, [prompt])


def test_a_prefix_takes_its_place_in_the_context(tmp_path: Path) -> None:
    adapter, spec = made(tiny_gpt2(tmp_path / "model"), tmp_path / "store", "prefix")
    with pytest.raises(OptionError, match=r"at most \d+, what the longest prompt leaves of 512"):
        ContinuePrompts(device="cpu", max_new_tokens=508)(
            (spec, adapter.frozen), adapter.context.files, ["abcdefgh"]
        )
