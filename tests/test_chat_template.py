"""Which tokens of a conversation carry the loss, in the styles of the templates that most models have."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest

from qpa.errors import DataError, OptionError
from qpa.training.data.chat_template import ChatTemplate
from qpa.training.data.examples import Conversation
from qpa.training.data.records import Origin
from qpa.training.data.token_rows import Tokeniser
from tests.chat_styles import LLAMA_3, PHI_3, STYLES

HERE = Origin("chats.jsonl", "line", 4)
TALK = [
    {"role": "user", "content": "How many legs has the cat?"},
    {"role": "assistant", "content": "Four, I think."},
    {"role": "user", "content": "And the bird \U0001f426?"},
    {"role": "assistant", "content": "Only two \U0001f426!"},
]
BRIEF = {"role": "system", "content": "Be brief."}


def talk(*messages: dict[str, Any], **options: Any) -> Conversation:
    return Conversation(messages, HERE, **options)


def row_of(tokenizer: Any, conversation: Conversation, loss_on: str | None = None) -> dict[str, list[int]]:
    tokeniser = Tokeniser(tokenizer, ChatTemplate(tokenizer, None), loss_on)
    return tokeniser.row(conversation)


def learnt(tokenizer: Any, conversation: Conversation, loss_on: str | None = None) -> list[str]:
    """Return the pieces of the text that carry the loss, decoded."""
    row = row_of(tokenizer, conversation, loss_on)
    assert [label for label in row["labels"] if label != -100] == [
        token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
    ]
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([token for token, _ in run]) for counts, run in runs if counts]


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


def answers(style: Any) -> list[str]:
    """Return what the assistant says, as the style writes it."""
    end = style.turn_end
    space = " " if style is STYLES["mistral"] else ""
    thought = "<think>\n\n</think>\n\n" if style is STYLES["qwen-3"] else ""
    return [f"{space}Four, I think.{end}", f"{space}{thought}Only two \U0001f426!{end}"]


@pytest.mark.parametrize("before", [(), (BRIEF,)], ids=["", "system"])
def test_exactly_the_words_of_the_assistant_and_their_end_carry_the_loss(style, before):
    tokenizer = style.tokenizer()
    assert learnt(tokenizer, talk(*before, *TALK)) == answers(style)


def test_one_begin_of_text_is_there_at_most(style):
    tokenizer = style.tokenizer()
    ids = row_of(tokenizer, talk(*TALK))["input_ids"]
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]
    if style.begin:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_the_last_answer_alone_may_carry_the_loss(style):
    assert learnt(style.tokenizer(), talk(*TALK), "completion") == answers(style)[-1:]


def test_a_prompt_of_messages_carries_none(style):
    found = learnt(style.tokenizer(), talk(*TALK, n_prompt=3))
    assert found == answers(style)[-1:]
    assert learnt(style.tokenizer(), talk(*TALK, n_prompt=3), "assistant") == found


def test_everything_may_carry_the_loss(style):
    tokenizer = style.tokenizer()
    row = row_of(tokenizer, talk(*TALK), "all")
    assert row["labels"] == row["input_ids"]


def test_messages_without_an_answer_carry_none(style):
    assert learnt(style.tokenizer(), talk(TALK[0])) == []
    if style.template != STYLES["gemma-3"].template and style.template != STYLES["mistral"].template:
        assert learnt(style.tokenizer(), talk(BRIEF)) == []


# Marks


MARKED = LLAMA_3.replace(
    "{{- message.content | trim + '<|eot_id|>' -}}",
    "{%- if message.role == 'assistant' -%}"
    "{% generation %}{{- message.content | trim + '<|eot_id|>' -}}{% endgeneration %}"
    "{%- else -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endif -%}",
)
"""The style of Llama 3 with marks."""


def test_marks_of_the_template_count():
    style = STYLES["llama-3"]
    assert learnt(style.tokenizer(MARKED), talk(BRIEF, *TALK)) == answers(style)
    plain, marked = (row_of(style.tokenizer(template), talk(*TALK)) for template in (LLAMA_3, MARKED))
    assert plain == marked
    begun = talk({"role": "assistant", "content": "Hello!"}, *TALK)
    assert learnt(style.tokenizer(MARKED), begun) == ["Hello!<|eot_id|>", *answers(style)]


def test_marks_that_end_within_a_character_s_bytes_take_the_whole_character():
    template = MARKED.replace("trim + '<|eot_id|>' -}}{% endgen", "trim -}}{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}{{- '<|eot_id|>' -}}"
    )
    assert learnt(STYLES["llama-3"].tokenizer(template), talk(*TALK))[-1] == "Only two \U0001f426!"
    bird = talk(TALK[0], {"role": "assistant", "content": "\U0001f426"})
    assert learnt(STYLES["llama-3"].tokenizer(template), bird) == ["\U0001f426"]


def test_marks_around_nothing_are_refused():
    template = LLAMA_3 + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"chats\.jsonl, line 4: expected marks around the assistant's words"):
        row_of(STYLES["llama-3"].tokenizer(template), talk(*TALK))


def test_trl_brings_marks_to_templates_that_it_knows(tmp_path):
    from trl.chat_template_utils import qwen3_chat_template

    style = STYLES["qwen-3"]
    tokenizer = style.tokenizer(qwen3_chat_template)
    tokeniser = Tokeniser(tokenizer, ChatTemplate(tokenizer, "trl"))
    row = tokeniser.row(talk(*TALK))
    kept = [token for token in row["labels"] if token != -100]
    thought = "<think>\n\n</think>\n\n"
    first, last = (f"{thought}{message['content']}<|im_end|>\n" for message in TALK[1::2])
    assert tokenizer.decode(kept) == first + last
    with pytest.raises(OptionError, match="chat_template: expected a tokenizer whose chat template TRL has"):
        ChatTemplate(style.tokenizer(), "trl")


def test_a_template_of_the_user_s_own_file_is_used(tmp_path):
    style = STYLES["llama-3"]
    file = tmp_path / "template.jinja"
    file.write_text(MARKED.replace("| trim", "| trim | upper"))
    tokenizer = style.tokenizer("")
    row = Tokeniser(tokenizer, ChatTemplate(tokenizer, str(file))).row(talk(*TALK))
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == (
        "FOUR, I THINK.<|eot_id|>ONLY TWO \U0001f426!<|eot_id|>"
    )
    with pytest.raises(DataError, match=r"none\.jinja: expected a data file, found no such file"):
        ChatTemplate(tokenizer, str(tmp_path / "none.jinja"))


# What a template does to the text


def test_assistant_turns_that_follow_each_other_all_carry_the_loss():
    style = STYLES["llama-3"]
    more = {"role": "assistant", "content": "Tails: one."}
    assert learnt(style.tokenizer(), talk(*TALK, more)) == [*answers(style), "Tails: one.<|eot_id|>"]
    assert learnt(style.tokenizer(), talk(*TALK, more), "completion") == [
        "Only two \U0001f426!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nTails: one.<|eot_id|>"
    ]


@pytest.mark.parametrize("content", ["  padded  ", "lines\n\n", "", "a<|eot_id|>b", "same"])
def test_white_space_and_special_tokens_in_an_answer_keep_its_borders(content):
    """Llama's template trims an answer, and Phi's keeps it as it is."""
    messages = [TALK[0], {"role": "assistant", "content": content}, *TALK[2:]]
    llama, phi = STYLES["llama-3"], STYLES["phi-3"]
    assert learnt(llama.tokenizer(), talk(*messages))[0] == f"{content.strip()}<|eot_id|>"
    assert learnt(phi.tokenizer(), talk(*messages))[0] == f"{content}<|end|>"


def test_a_token_that_is_the_assistant_s_in_part_carries_the_loss():
    """The line end of Phi's header and the first of the answer are one token."""
    answer = {"role": "assistant", "content": "\nFour."}
    assert learnt(STYLES["phi-3"].tokenizer(), talk(TALK[0], answer)) == ["\n\nFour.<|end|>"]


def test_what_was_thought_is_learnt_where_the_template_shows_it():
    style = STYLES["qwen-3"]
    thoughtful = {**TALK[3], "reasoning_content": "Birds walk."}
    found = learnt(style.tokenizer(), talk(*TALK[:3], thoughtful))
    assert found[1] == "<think>\nBirds walk.\n</think>\n\nOnly two \U0001f426!<|im_end|>"
    with pytest.raises(DataError, match='that shows "reasoning_content", found one that leaves it out'):
        learnt(STYLES["llama-3"].tokenizer(), talk(*TALK[:3], thoughtful))


TOOL = {"type": "function", "function": {"name": "count_legs", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "count_legs", "arguments": {}}}],
}


def test_tools_reach_the_template_or_are_refused():
    style = STYLES["qwen-3"]
    conversation = talk(TALK[0], CALL, {"role": "tool", "content": "4"}, TALK[1], tools=[TOOL])
    tokenizer = style.tokenizer()
    text = ChatTemplate(tokenizer, None).whole(conversation)
    assert '"name": "count_legs"' in text and "<tool_call>count_legs</tool_call>" in text
    assert learnt(tokenizer, conversation, "completion") == [
        f"<think>\n\n</think>\n\nFour, I think.{style.turn_end}"
    ]
    assert learnt(tokenizer, conversation) == [
        "<tool_call>count_legs</tool_call><|im_end|>",
        f"<think>\n\n</think>\n\nFour, I think.{style.turn_end}",
    ]
    with pytest.raises(DataError, match="expected a chat template that shows tools"):
        learnt(STYLES["llama-3"].tokenizer(), talk(*TALK, tools=[TOOL]))
    with pytest.raises(DataError, match='that shows "tool_calls"'):
        learnt(STYLES["llama-3"].tokenizer(), talk(TALK[0], CALL))


def test_a_call_is_learnt_as_the_last_answer_is():
    style = STYLES["qwen-3"]
    assert learnt(style.tokenizer(), talk(TALK[0], CALL, tools=[TOOL])) == [
        "<think>\n\n</think>\n\n<tool_call>count_legs</tool_call><|im_end|>"
    ]


def test_further_arguments_reach_the_template():
    tokenizer = STYLES["llama-3"].tokenizer(LLAMA_3.replace("| trim", "| replace('cat', animal) | trim"))
    row = row_of(tokenizer, talk(*TALK, arguments={"animal": "dog"}))
    assert "has the dog?" in tokenizer.decode(row["input_ids"])


# What is refused

LATE_SYSTEM = STYLES["mistral"].template.replace("first if loop.first", "first if loop.last")
"""As some templates of Mistral: only a message that is answered next is given what the system says."""


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("", TALK, "a chat template for messages, found none in the tokenizer; give one by `chat_template`"),
        (LATE_SYSTEM, [BRIEF, *TALK], r"shows where an answer begins and ends, .* anew around message 3"),
        (LLAMA_3, [TALK[1], *TALK], "a message before the assistant's first, found none; add one"),
        (
            "{{ messages[9].content.x }}",
            TALK,
            "messages that the chat template takes, found list object has no element 9",
        ),
        ("{% if %}", TALK, "messages that the chat template takes, found"),
        (STYLES["gemma-3"].template, TALK[1:], "found user and model take turns"),
    ],
    ids=["none", "late system", "assistant first", "undefined", "syntax", "raises"],
)
def test_what_a_template_does_not_take_is_refused_with_the_line(template, messages, message):
    tokenizer = STYLES["mistral"].tokenizer(template)
    with pytest.raises(DataError, match=message) as caught:
        row_of(tokenizer, talk(*messages))
    assert caught.value.subject == "chats.jsonl, line 4"


def test_a_tokenizer_that_knows_no_places_is_refused():
    class Slow:
        """A tokenizer in Python, as transformers still has some."""

        eos_token, chat_template, all_special_tokens, added_tokens_decoder = "</s>", PHI_3, ["</s>"], {}

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "".join(message["content"] for message in messages)

        def get_chat_template(self, **_: Any) -> str:
            return PHI_3

        def __call__(self, text: str, **_: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(DataError, match=r"a tokenizer of the tokenizers library, .* found Slow"):
        row_of(Slow(), talk(*TALK))
