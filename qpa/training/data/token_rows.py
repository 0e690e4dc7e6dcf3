"""Examples as rows of tokens with labels.

TRL prepares rows only inside a trainer, whose construction changes the model. Here no model is needed, so
that every trainer, whoever wrote it, and every score see the same rows. For texts and for prompts with
completions they are the rows of TRL's SFTTrainer.

Rules:
1. The end-of-text token follows a text, or a completion, that does not end with it already.
2. A prompt and its completion are tokenised as one text. The completion begins where the tokens of both part
   from those of the prompt alone; what stands before it carries no loss.
3. Conversations become a text by the chat template, which also brings all special tokens. What carries the
   loss are tokens of which any character is the assistant's, its end-of-turn token included.
4. A text that begins with the begin-of-text token gets no second one.
5. Rows are cut to `max_length` tokens, and a row without a label left is dropped; both are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qpa.errors import DataError, OptionError
from qpa.training.data.chat_template import ChatTemplate, Span
from qpa.training.data.common_start import n_common
from qpa.training.data.examples import Answer, Conversation, Example, Preference, Text

IGNORED = -100
"""The label of a token that carries no loss."""

Row = dict[str, Any]
"""A row with "input_ids" and "labels": token ids, and the same or -100 where there is no loss."""


class Tokeniser:
    """Make rows of examples.

    Args:    tokenizer: of transformers, with an end-of-text token.
             template: makes texts of conversations.
             loss_on: what carries the loss, one of `qpa.training.data.data_options.LOSS_ON`; None is
             "completion" for an answer, "assistant" for a conversation and "all" for a text.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, loss_on: str | None = None) -> None:
        self.tokenizer, self.template, self.loss_on = tokenizer, template, loss_on

    def row(self, example: Example) -> Row:
        """Return the whole row of an example, uncut.

        Raises:  DataError: a chat template does not take the example.
                 OptionError: `loss_on` does not fit it.
        """
        if isinstance(example, Text):
            self._check_loss_on(example, "all")
            ids = self.tokens(_ended(example.text, self.tokenizer.eos_token))
            return {"input_ids": ids, "labels": list(ids)}
        if isinstance(example, Answer):
            self._check_loss_on(example, "completion", "all")
            return self._answer(example)
        if isinstance(example, Conversation):
            return self._conversation(example)
        raise TypeError(type(example).__name__)

    def pair(self, example: Preference) -> dict[str, list[int]]:
        """Return the tokens of a preference: "prompt_ids", "chosen_ids" and "rejected_ids", as TRL has them.

        Both answers begin where the tokens of either part from those of the prompt.

        Raises:  DataError: a chat template does not take the example.
        """
        prompt, chosen, rejected = self._prompt(example.chosen), *map(self._whole, _both(example))
        n_prompt = min(n_common(prompt, chosen), n_common(prompt, rejected))
        return {
            "prompt_ids": prompt[:n_prompt],
            "chosen_ids": chosen[n_prompt:],
            "rejected_ids": rejected[n_prompt:],
        }

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text with the special tokens that the tokenizer puts around one."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin] and text.startswith(self.tokenizer.bos_token):
            return ids[1:]
        return ids

    def _check_loss_on(self, example: Example, *fitting: str) -> None:
        if self.loss_on is not None and self.loss_on not in fitting:
            kind = "texts" if isinstance(example, Text) else "prompts that are no messages"
            raise OptionError("loss_on", f"{' or '.join(fitting)} for {kind}", self.loss_on)

    def _answer(self, example: Answer) -> Row:
        ids = self._whole(example)
        n_prompt = 0 if self.loss_on == "all" else n_common(self._prompt(example), ids)
        return {"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]}

    def _whole(self, example: Answer | Conversation) -> list[int]:
        if isinstance(example, Answer):
            return self.tokens(example.prompt + _ended(example.completion, self.tokenizer.eos_token))
        return self._chat_tokens(self.template.whole(example))

    def _prompt(self, example: Answer | Conversation) -> list[int]:
        if isinstance(example, Answer):
            return self.tokens(example.prompt)
        before = example.messages[: example.n_prompt]
        return self._chat_tokens(self.template.render(example, before, asks=True))

    def _chat_tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _conversation(self, example: Conversation) -> Row:
        text, spans = self._spans(example)
        try:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except NotImplementedError as error:
            expected = "a tokenizer of the tokenizers library, which says where in a text its tokens stand"
            raise DataError(str(example.origin), expected, type(self.tokenizer).__name__) from error
        ids, places = found["input_ids"], found["offset_mapping"]
        return {"input_ids": ids, "labels": _labels(text, ids, places, spans)}

    def _spans(self, example: Conversation) -> tuple[str, Sequence[Span]]:
        """Return a conversation's text and the pieces of it that carry the loss."""
        if self.loss_on == "all":
            text = self.template.whole(example)
            return text, [Span(0, len(text))]
        if self.loss_on == "completion" or (self.loss_on is None and example.n_prompt is not None):
            return self.template.completion(example)
        text, spans = self.template.answers(example)
        if example.n_prompt is not None:
            _, after = self.template.completion(example)
            spans = [span for span in spans if after and span.end > after[0].start]
        return text, spans


def cut(row: Row, max_length: int) -> Row:
    """Return the first `max_length` tokens of a row and their labels."""
    return {name: values[:max_length] for name, values in row.items()}


def has_loss(row: Row) -> bool:
    """Return whether any token of a row has a label."""
    return any(label != IGNORED for label in row["labels"])


def _labels(
    text: str, ids: Sequence[int], places: Iterable[tuple[int, int]], spans: Sequence[Span]
) -> list[int]:
    """Return the ids of tokens that have a character in one of the pieces, -100 for the others."""
    counts = bytearray(len(text))
    for start, end in spans:
        counts[start:end] = b"\1" * (end - start)
    return [
        token if 1 in counts[start:end] else IGNORED for token, (start, end) in zip(ids, places, strict=True)
    ]


def _both(example: Preference) -> tuple[Answer | Conversation, Answer | Conversation]:
    return example.chosen, example.rejected


def _ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end
