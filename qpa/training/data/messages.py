"""Check the messages of a conversation, and bring those of other notations to "role" and "content"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qpa.errors import DataError, one_of
from qpa.training.data.records import Origin, check_characters

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""The roles of chat templates; what carries the loss is the assistant's."""

_SHAREGPT_ROLES = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "model", "chatgpt", "bard", "bing")},
    "system": "system",
    **{name: "tool" for name in ("tool", "observation", "function_response")},
}

_WEIGHTS = ("weight", "train", "train_on_turn")
"""Keys by which other tools say whether a message carries a loss."""


def read_messages(origin: Origin, name: str, value: Any) -> list[dict[str, Any]]:
    """Return the messages of a column: a list of them, or its JSON, as a CSV file has it.

    Rules:
    1. Keys without a value are left out; other keys than "role" and "content" stay for the chat template.
    2. A content of several pieces of text becomes one text.

    Args:    name: of the column, for errors.
    Raises:  DataError: something in it is not a message that a chat template can take.
    """
    if isinstance(value, str):
        value = parse_json(origin, name, value)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(str(origin), f'"{name}" with a list of messages', found)
    check_characters(origin, name, value)
    return [_read_message(origin, f'"{name}", message {n}', item) for n, item in enumerate(value, start=1)]


def read_conversations(origin: Origin, value: Any) -> list[dict[str, Any]]:
    """Return the messages of ShareGPT's notation, "from" and "value"; that of `read_messages` is taken too.

    Raises:  DataError: see `read_messages`; or "from" is no one that is known.
    """
    name = "conversations"
    if isinstance(value, str):
        value = parse_json(origin, name, value)
    if isinstance(value, list) and all(isinstance(turn, dict) and "from" in turn for turn in value):
        value = [_renamed(origin, turn) for turn in value]
    return read_messages(origin, name, value)


def parse_json(origin: Origin, name: str, text: str) -> Any:
    """Return what the JSON in a column says.

    Raises:  DataError: it is broken.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            str(origin), f'"{name}" with a list, or its JSON', f"broken JSON ({error})"
        ) from error


def _renamed(origin: Origin, turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker = turn["from"]
    if speaker not in _SHAREGPT_ROLES:
        raise DataError(str(origin), f'"from" to be {one_of(tuple(_SHAREGPT_ROLES))}', str(speaker))
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES[speaker], "content": turn.get("value"), **others}


def _read_message(origin: Origin, subject: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(str(origin), f'{subject} with "role" and "content"', type(value).__name__)
    message = {key: item for key, item in value.items() if item is not None}
    if message.get("role") not in ROLES:
        raise DataError(str(origin), f'{subject}: "role" to be {one_of(ROLES)}', str(message.get("role")))
    weights = [key for key in _WEIGHTS if key in message]
    if weights:
        advice = "leave it out; `loss_on` says which turns carry the loss"
        raise DataError(str(origin), f"{subject} without a weight of its own", f'"{weights[0]}"', advice)
    if "content" not in message and "tool_calls" in message:
        message["content"] = ""
    message["content"] = _text_of(origin, subject, message.get("content"))
    return message


def _text_of(origin: Origin, subject: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    expected = f'{subject}: "content" with a text'
    if not isinstance(content, list):
        raise DataError(str(origin), expected, type(content).__name__)
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type", "a part without text") if isinstance(part, dict) else type(part).__name__
            raise DataError(str(origin), expected, str(kind))
    return "".join(part["text"] for part in content)
