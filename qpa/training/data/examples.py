"""What a model learns from: a text, an answer to a prompt, or a preference between two of these.

A conversation is a list of messages, which a chat template makes a text of; a message is an object with
"role" and "content", and what else the template reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpa.training.data.records import Origin

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A text that is learnt as a whole."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class Answer:
    """A prompt and what follows it."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Args:    messages: at least one.
             n_prompt: how many of them are the prompt; None where that is not said.
             tools: JSON schemas of functions that the assistant may call.
             arguments: what else the template takes, by name, such as "enable_thinking".
    """

    messages: Sequence[Message]
    origin: Origin
    n_prompt: int | None = None
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt, of which the first is preferred."""

    chosen: Answer | Conversation
    rejected: Answer | Conversation
    origin: Origin


Example = Text | Answer | Conversation | Preference
