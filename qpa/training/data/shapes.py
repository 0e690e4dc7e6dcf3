"""What the columns of a record mean: the shapes that data for fine-tuning comes in.

    text                              the text
    prompt, completion                two strings, or two lists of messages
    messages                          messages with "role" and "content"
    conversations                     ShareGPT's messages, with "from" and "value"
    instruction, output (and input)   alpaca's
    user, assistant (and system)      strings that become messages
    chosen, rejected (and prompt)     a preference, as strings or as messages

The first of them whose columns a record has is its shape, and all records of a data set have the same one.
`columns` gives columns of other names these names, and then only columns that it names count. Columns that
belong to no shape are left alone. To add a shape, add a line to `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpa.errors import DataError, OptionError
from qpa.training.data.common_start import n_common
from qpa.training.data.examples import Answer, Conversation, Example, Preference, Text
from qpa.training.data.messages import parse_json, read_conversations, read_messages
from qpa.training.data.records import Record, check_characters, names_in


@dataclass(frozen=True)
class Shape:
    """One way to say what is learnt.

    Args:    columns: that a record must have.
             make: returns the example of a record with these columns, None where what is to be learnt is
             empty; its last argument is whether there is a chat template.
             others: columns that it reads where they are there.
    """

    columns: tuple[str, ...]
    make: Callable[[Record, bool], Example | None]
    others: tuple[str, ...] = ()


class ShapeReader:
    """Make examples of records that all have one shape.

    Args:    wanted: the names of shapes that fit the objective, in the order in which they are looked for.
             columns: the user's "theirs=ours".
             has_template: whether there is a chat template.
    Raises:  OptionError: `columns` is not such a list, or names no column of a shape.
    """

    def __init__(self, wanted: Sequence[str], columns: Sequence[str] | None, *, has_template: bool) -> None:
        self.wanted, self.has_template = wanted, has_template
        self.names = _parse_columns(columns or ())
        self.shape = ""

    def read(self, record: Record) -> Example | None:
        """Return the example of a record; None where its text or answer is empty.

        Raises:  DataError: the record has no shape, another one than those before it, or a broken value.
        """
        record = self._renamed(record)
        name = self._shape_of(record)
        if self.shape and name != self.shape:
            expected = f"rows with {_words(SHAPES[self.shape].columns)}, as those before"
            raise DataError(str(record.origin), expected, names_in(record.content))
        self.shape = name
        return SHAPES[name].make(record, self.has_template)

    def _renamed(self, record: Record) -> Record:
        if not self.names:
            return record
        missing = [theirs for theirs in self.names if theirs not in record.content]
        if missing:
            expected = f'"{missing[0]}", which `columns` names'
            raise DataError(str(record.origin), expected, names_in(record.content))
        content = {ours: record.content[theirs] for theirs, ours in self.names.items()}
        return Record(content, record.origin)

    def _shape_of(self, record: Record) -> str:
        for name in self.wanted:
            if all(column in record.content for column in SHAPES[name].columns):
                return name
        expected = "; ".join(_words(SHAPES[name].columns) for name in self.wanted)
        raise DataError(
            str(record.origin), f"one of: {expected}", names_in(record.content), self._advice(record.content)
        )

    def _advice(self, content: Mapping[str, Any]) -> str:
        others = [name for name in SHAPES if name not in self.wanted]
        for name in others:
            if all(column in content for column in SHAPES[name].columns):
                return f"{_words(SHAPES[name].columns)} are for another `objective`"
        for theirs in _LIKELY:
            if all(column in content for column in theirs):
                pairs = zip(theirs, ("prompt", "completion"), strict=True)
                return "say which is which: `columns` " + ",".join(f"{a}={b}" for a, b in pairs)
        return "say which is which with `columns`, such as question=prompt,answer=completion"


_LIKELY = (
    *(("question", "answer"), ("query", "response"), ("prompt", "response"), ("instruction", "response")),
    *(("problem", "solution"), ("question", "response"), ("input", "output"), ("prompt", "output")),
    *(("source", "target"), ("article", "highlights"), ("document", "summary"), ("inputs", "targets")),
)
"""Names that others give to a prompt and its answer."""


def _parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """Return our names of columns by theirs."""
    known = {name for shape in SHAPES.values() for name in (*shape.columns, *shape.others)}
    names: dict[str, str] = {}
    for pair in columns:
        theirs, equals, ours = (part.strip() for part in pair.rpartition("="))
        if not (theirs and equals):
            raise OptionError("columns", "pairs such as question=prompt,answer=completion", pair)
        if ours not in known:
            raise OptionError("columns", f"one of {', '.join(sorted(known))} behind =", ours)
        if theirs in names or ours in names.values():
            raise OptionError("columns", "each name once", pair)
        names[theirs] = ours
    return names


def _words(names: Sequence[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)


def _string(record: Record, name: str, *, may_lack: bool = False) -> str:
    """Return the text of a column.

    Raises:  DataError: it is no text, or has half of a surrogate pair.
    """
    value = record.content.get(name)
    if value is None and may_lack:
        return ""
    if not isinstance(value, str):
        raise DataError(str(record.origin), f'"{name}" with a text', type(value).__name__)
    check_characters(record.origin, name, value)
    return value


def _text(record: Record, has_template: bool) -> Example | None:
    text = _string(record, "text")
    return Text(text, record.origin) if text.strip() else None


def _prompt_completion(record: Record, has_template: bool) -> Example | None:
    return _answer(record, record.content["prompt"], "completion")


def _answer(record: Record, prompt: Any, name: str) -> Answer | Conversation | None:
    """Return a prompt with the answer in a column, a string or a list of messages as the prompt is."""
    if isinstance(prompt, list):
        before = read_messages(record.origin, "prompt", prompt)
        return _conversation(record, [*before, *_messages(record, name)], n_prompt=len(before))
    if not isinstance(prompt, str):
        raise DataError(str(record.origin), '"prompt" with a text or messages', type(prompt).__name__)
    check_characters(record.origin, "prompt", prompt)
    answer = _string(record, name)
    return Answer(prompt, answer, record.origin) if answer.strip() else None


def _messages(record: Record, name: str) -> list[dict[str, Any]]:
    return read_messages(record.origin, name, record.content[name])


def _conversation(
    record: Record, messages: list[dict[str, Any]], n_prompt: int | None = None
) -> Conversation:
    tools = record.content.get("tools")
    if isinstance(tools, str):
        tools = parse_json(record.origin, "tools", tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(str(record.origin), '"tools" with a list of JSON schemas', type(tools).__name__)
    arguments = record.content.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise DataError(str(record.origin), '"chat_template_kwargs" with an object', type(arguments).__name__)
    check_characters(record.origin, "tools", tools)
    return Conversation(messages, record.origin, n_prompt, tools or None, arguments)


def _from_messages(record: Record, has_template: bool) -> Example | None:
    return _conversation(record, _messages(record, "messages"))


def _from_conversations(record: Record, has_template: bool) -> Example | None:
    return _conversation(record, read_conversations(record.origin, record.content["conversations"]))


def _alpaca(record: Record, has_template: bool) -> Example | None:
    """Return one turn of messages, or with headings where there is no chat template."""
    instruction, output = _string(record, "instruction"), _string(record, "output")
    given = _string(record, "input", may_lack=True)
    if not output.strip():
        return None
    if has_template:
        return _one_turn(record, "\n\n".join(filter(None, (instruction, given))), output)
    asked = [f"### Instruction:\n{instruction}", *([f"### Input:\n{given}"] if given else [])]
    system = _string(record, "system", may_lack=True)
    parts = [*([system] if system else []), *asked, "### Response:\n"]
    return Answer("\n\n".join(parts), output, record.origin)


def _roles(record: Record, has_template: bool) -> Example | None:
    asked, answered = _string(record, "user"), _string(record, "assistant")
    return _one_turn(record, asked, answered) if answered.strip() else None


def _one_turn(record: Record, asked: str, answered: str) -> Conversation:
    system = _string(record, "system", may_lack=True)
    said = [("system", system)] if system else []
    said += [("user", asked), ("assistant", answered)]
    messages = [{"role": role, "content": content} for role, content in said]
    return _conversation(record, messages, n_prompt=len(messages) - 1)


def _preference(record: Record, has_template: bool) -> Example | None:
    """Return two answers; without a prompt of its own it is what they have in common at their start."""
    chosen, rejected = record.content["chosen"], record.content["rejected"]
    prompt = record.content.get("prompt")
    if isinstance(chosen, list) and not isinstance(prompt, list):
        lists = [_messages(record, "chosen"), _messages(record, "rejected")]
        n_prompt = n_common(*lists)
        if not n_prompt:
            raise DataError(str(record.origin), '"chosen" and "rejected" that begin with one prompt', "none")
        if n_prompt == min(map(len, lists)):
            return None
        both = [_conversation(record, messages, n_prompt=n_prompt) for messages in lists]
        return Preference(both[0], both[1], record.origin)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        from trl.data_utils import extract_prompt

        found = extract_prompt({"chosen": chosen, "rejected": rejected})
        record = Record({**record.content, **found}, record.origin)
        prompt = found["prompt"]
    answers = [_answer(record, prompt, name) for name in ("chosen", "rejected")]
    if answers[0] is None or answers[1] is None or chosen == rejected:
        return None
    return Preference(answers[0], answers[1], record.origin)


_FOR_TEMPLATES = ("tools", "chat_template_kwargs")
SHAPES: dict[str, Shape] = {
    "prompt-completion": Shape(("prompt", "completion"), _prompt_completion, _FOR_TEMPLATES),
    "text": Shape(("text",), _text),
    "messages": Shape(("messages",), _from_messages, _FOR_TEMPLATES),
    "conversations": Shape(("conversations",), _from_conversations, _FOR_TEMPLATES),
    "alpaca": Shape(("instruction", "output"), _alpaca, ("input", "system")),
    "roles": Shape(("user", "assistant"), _roles, ("system", *_FOR_TEMPLATES)),
    "preference": Shape(("chosen", "rejected"), _preference, ("prompt", *_FOR_TEMPLATES)),
}
"""By name, in the order in which they are looked for."""

PREFERENCE = ("preference",)
INSTRUCTION = tuple(name for name in SHAPES if name not in PREFERENCE)
