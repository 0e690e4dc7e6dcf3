"""Make texts of conversations, and find what in them the assistant says.

Rules:
1. The text is what the chat template makes of all messages.
2. Where the template marks what the model generates, those marks count.
3. Otherwise an answer begins where the text parts from that of the messages before it with the template's
   prompt for an answer. It ends with the token behind its content that ends a turn, or, where there is none,
   where the next message begins. Two texts show this: the one that ends with the answer, which must be how
   the whole text begins; or, where a template writes a turn anew once another one follows, the whole text
   with a mark behind the content, which must be the same text otherwise.
4. Where neither holds, the conversation is refused: what is not known to be right is not trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from qpa.compat.transformers_ import render_with_marks
from qpa.errors import DataError, OptionError, one_sentence
from qpa.training.data.common_start import n_common
from qpa.training.data.examples import Conversation, Message
from qpa.training.data.sources.text_file import read_text

TRL = "trl"
"""The name of TRL's own variants of well-known templates, which have marks."""

_MARK = "\ue000"
"""A character of Unicode's private use, which no template knows."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message for what it thinks before it answers."""

_GIVE_MARKS = "give a template with {% generation %} marks by `chat_template`"


class Span(NamedTuple):
    """A piece of a text, in characters."""

    start: int
    end: int


class ChatTemplate:
    """The chat template of a tokenizer or of a user's file.

    Args:    tokenizer: of transformers.
             source: None for the tokenizer's own template, "trl", or a file.
    Raises:  OptionError: TRL has no variant of the tokenizer's template.
             DataError: the file is missing or no text.
    """

    def __init__(self, tokenizer: Any, source: str | None) -> None:
        self.tokenizer, self.source = tokenizer, source
        self._given: str | None = None
        if source == TRL:
            self._given = _trl_template(tokenizer)
        elif source is not None:
            self._given = read_text(Path(source))

    @property
    def exists(self) -> bool:
        """Return whether there is a template."""
        return bool(self._given or self.tokenizer.chat_template)

    @property
    def text(self) -> str:
        """Return the template, the default one of several."""
        return self._text_for(None)

    @property
    def digest(self) -> str:
        """Return "sha256:" and the SHA-256 of the template, the default one of several."""
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()}"

    def render(self, conversation: Conversation, messages: Sequence[Message], *, asks: bool = False) -> str:
        """Return the text of some messages of a conversation.

        Args:    asks: the template's prompt for an answer follows.
        Raises:  DataError: the template refuses them, or there is none.
        """
        tools, arguments = conversation.tools, conversation.arguments
        return self._render(conversation, messages, tools, {**arguments, "add_generation_prompt": asks})

    def answers(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the pieces of it that the assistant says, in order.

        Raises:  DataError: the template refuses it, leaves something out, or does not show its answers.
        """
        if "generation" in self._tags(conversation):
            found = self._marked(conversation)
            if not found[1] and any(message["role"] == "assistant" for message in conversation.messages):
                raise _error(
                    conversation, "marks around the assistant's words", "none", "correct the template"
                )
            return found
        text = self.whole(conversation)
        return text, [
            self._answer(conversation, text, index)
            for index, message in enumerate(conversation.messages)
            if message["role"] == "assistant"
        ]

    def completion(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and what follows its prompt, as one piece.

        Without a prompt of its own, it is all that stands before the last answer.

        Raises:  DataError: see `answers`.
        """
        text, messages = self.whole(conversation), conversation.messages
        n_prompt = conversation.n_prompt
        if n_prompt is None:
            asked = [n for n, message in enumerate(messages, 1) if message["role"] != "assistant"]
            n_prompt = asked[-1] if asked else 0
        if n_prompt >= len(messages):
            return text, []
        start = self._start(conversation, text, n_prompt)
        return text, [Span(start, self._stop(text, start, len(text)))]

    def whole(self, conversation: Conversation) -> str:
        """Return the text of a conversation.

        Raises:  DataError: the template refuses it, or leaves tools or thoughts out.
        """
        text = self.render(conversation, conversation.messages)
        _check_kept(self, conversation, text)
        return text

    def _text_for(self, tools: Any) -> str:
        text: str = self._given or self.tokenizer.get_chat_template(tools=tools)
        return text

    def _tags(self, conversation: Conversation) -> list[str]:
        self._check_exists(conversation)
        return re.findall(r"\{%-?\s*(generation)\s*-?%\}", self._text_for(conversation.tools))

    def _check_exists(self, conversation: Conversation) -> None:
        if not self.exists:
            found, advice = "none in the tokenizer", "give one by `chat_template`"
            raise _error(conversation, "a chat template for messages", found, advice)

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], tools: Any, arguments: dict[str, Any]
    ) -> str:
        self._check_exists(conversation)
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, chat_template=self._given, **arguments
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise _error(
                conversation, "messages that the chat template takes", one_sentence(error)
            ) from error
        return text

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        template = self._text_for(conversation.tools)
        text = self.whole(conversation)
        arguments = {**conversation.arguments, "tools": conversation.tools}
        marked, marks = render_with_marks(template, conversation.messages, self.tokenizer, **arguments)
        if marked != text:
            raise _error(conversation, "the same text with marks and without", "another one", _GIVE_MARKS)
        return text, [Span(start, end) for start, end in marks if end > start]

    def _answer(self, conversation: Conversation, text: str, index: int) -> Span:
        """Return where the assistant's message of an index stands in the text."""
        start = self._start(conversation, text, index)
        whole = self.render(conversation, conversation.messages[: index + 1])
        end = len(whole) if text.startswith(whole) else self._end(conversation, text, index)
        if end <= start:
            raise _unknown(conversation, index)
        return Span(start, self._stop(text, start, end))

    def _start(self, conversation: Conversation, text: str, index: int) -> int:
        """Return where the answer after the first `index` messages begins."""
        before = conversation.messages[:index]
        if not before:
            expected = "a message before the assistant's first"
            raise _error(conversation, expected, "none", f"add one, or {_GIVE_MARKS}")
        asked = self.render(conversation, before, asks=True)
        start = n_common(asked, text)
        if start < len(asked):
            # A prompt for an answer may open a thought that a whole turn does not have.
            unasked = self.render(conversation, before)
            if not text.startswith(unasked) or start < len(unasked):
                raise _unknown(conversation, index)
        return start

    def _end(self, conversation: Conversation, text: str, index: int) -> int:
        """Return where an answer ends whose turn is written anew once another message follows."""
        content = conversation.messages[index]["content"]
        for marked in (content + _MARK, content.rstrip() + _MARK):
            with_mark = self._with_content(conversation, index, marked, len(conversation.messages))
            if with_mark.count(_MARK) != 1 or with_mark.replace(_MARK, "") != text:
                continue
            end = with_mark.index(_MARK)
            _, found, closing = self._with_content(conversation, index, marked, index + 1).partition(_MARK)
            following = text[end:]
            special = self._special.search(closing)
            stop = closing[: special.end()] if special else closing[: n_common(closing, following)]
            if found and following.startswith(stop):
                return end + len(stop)
        raise _unknown(conversation, index)

    def _with_content(self, conversation: Conversation, index: int, content: str, n_messages: int) -> str:
        messages = [dict(message) for message in conversation.messages[:n_messages]]
        messages[index]["content"] = content
        return self.render(conversation, messages)

    def _stop(self, text: str, start: int, end: int) -> int:
        """Return the end of a piece without what follows the first of the special tokens at its end."""
        stop, left = end, text[start:end].rstrip()
        while token := next((one for one in self._special_tokens if left.endswith(one)), ""):
            stop = start + len(left)
            left = left.removesuffix(token).rstrip()
        return stop

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        """Return the tokenizer's special tokens, longer ones first."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return tuple(sorted(special, key=lambda token: (-len(token), token)))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Return a pattern of the tokenizer's special tokens."""
        return re.compile("|".join(map(re.escape, self._special_tokens)) or r"(?!)")


def _trl_template(tokenizer: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    expected = "a tokenizer whose chat template TRL has a training variant of"
    if not tokenizer.chat_template:
        raise OptionError("chat_template", expected, "none")
    try:
        found: str | None = get_training_chat_template(tokenizer)
    except Exception as error:  # it also runs the template, which may raise anything
        raise OptionError("chat_template", expected, "another one", _GIVE_MARKS) from error
    return found


def _check_kept(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Refuse tools, and the last answer's calls and thoughts, where the template leaves them out."""
    messages = conversation.messages
    if conversation.tools and text == template.render(_without_tools(conversation), messages):
        raise _error(conversation, "a chat template that shows tools", "one that leaves them out")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    keys = ("tool_calls", *_THOUGHTS)
    for index in answers[-1:]:
        kept = {key: value for key, value in messages[index].items() if key not in keys}
        if any(messages[index].get(key) for key in keys):
            others = [*messages[:index], kept, *messages[index + 1 :]]
            if text == template.render(conversation, others):
                names = ", ".join(f'"{key}"' for key in keys if key in messages[index])
                raise _error(conversation, f"a chat template that shows {names}", "one that leaves it out")


def _without_tools(conversation: Conversation) -> Conversation:
    return Conversation(conversation.messages, conversation.origin, arguments=conversation.arguments)


def _error(conversation: Conversation, expected: str, found: str, advice: str = "") -> DataError:
    return DataError(str(conversation.origin), expected, found, advice)


def _unknown(conversation: Conversation, index: int) -> DataError:
    expected = "a chat template that shows where an answer begins and ends"
    found = f"one that writes earlier messages anew around message {index + 1}"
    return _error(conversation, expected, found, f"{_GIVE_MARKS}, or try `chat_template` trl")
