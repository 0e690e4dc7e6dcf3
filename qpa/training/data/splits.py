"""From a user's files to the rows that a model trains on and those that it is scored on.

    names --read_sources--> texts or records --ShapeReader--> examples --hold out--> two splits
          --Tokeniser--> token rows with labels --cut--> at most `max_length` tokens --pack--> rows

Texts are one stream: they are tokenised one by one, follow each other with an end-of-text token between them,
and are cut into blocks of `max_length` tokens; the last block may be shorter. Without `eval_data` the
evaluation split is a share of `data`: the end of the stream, or rows drawn with the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qpa.documents.data_summary import DataSummary, HubDataset, SplitSummary
from qpa.errors import DataError, OptionError
from qpa.training.data.chat_template import ChatTemplate
from qpa.training.data.data_options import DataOptions, names_of
from qpa.training.data.examples import Conversation, Example, Preference
from qpa.training.data.packing import pack_rows
from qpa.training.data.shapes import INSTRUCTION, PREFERENCE, ShapeReader
from qpa.training.data.sources.source import Sources, read_sources
from qpa.training.data.token_rows import IGNORED, Row, Tokeniser, cut, has_loss

STREAM = "stream"
"""The shape of text files, in place of one of `qpa.training.data.shapes.SHAPES`."""


ANSWERS = ("chosen_ids", "rejected_ids")
"""The columns of the two answers of a preference."""


class Splits(NamedTuple):
    """The rows that are trained on, and those that are scored.

    Every row has "input_ids" and "labels", lists of token ids of one length; a label is -100 where a token
    does not count. These two identify a row: the digest of the data is made of them. What else an
    objective needs of a row is in it too. The summary counts what was read and left out.
    """

    training: list[Row]
    evaluation: list[Row]
    summary: DataSummary | None = None


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Args:    examples: in order.
             n_empty: records without anything to learn.
    """

    examples: list[Example]
    n_empty: int


@dataclass(frozen=True)
class ExampleSplits:
    """Both splits of records before they are tokens.

    Args:    shape: a name in `qpa.training.data.shapes.SHAPES`.
             template: for conversations.
             hub: the datasets of the Hub that were read.
    """

    training: Examples
    evaluation: Examples
    shape: str
    template: ChatTemplate
    hub: tuple[HubDataset, ...]

    def summary(self, training: SplitSummary, evaluation: SplitSummary) -> DataSummary:
        """Return the summary of the data from those of its splits."""
        chats = any(_is_chat(one) for split in (self.training, self.evaluation) for one in split.examples)
        return DataSummary(
            shape=self.shape,
            hub=self.hub,
            chat_template=self.template.digest if chats else None,
            training=training,
            evaluation=evaluation,
        )


def instruction_splits(options: DataOptions, tokenizer: Any, seed: int) -> Splits:
    """Return the token rows of texts, of prompts with completions and of conversations.

    Args:    seed: draws the rows that are held out.
    Raises:  DataError: something is missing or damaged, or nothing that carries a loss is left of a split.
             OptionError: an option does not fit the data.
    """
    _check(options)
    data, evaluation = _read(options)
    if data.texts and (evaluation is None or evaluation.texts):
        return _stream_splits(options, tokenizer, data, evaluation)
    read = _example_splits(options, tokenizer, data, evaluation, seed, INSTRUCTION)
    tokeniser = Tokeniser(tokenizer, read.template, options.loss_on)
    training, of_training = _rows(read.training, tokeniser, options.max_length)
    evaluated, of_evaluation = _rows(read.evaluation, tokeniser, options.max_length)
    return _packed(options, Splits(training, evaluated, read.summary(of_training, of_evaluation)))


def preference_splits(options: DataOptions, tokenizer: Any, seed: int) -> Splits:
    """Return the token rows of preferences, as TRL's DPOTrainer prepares them.

    A row has "prompt_ids", "chosen_ids" and "rejected_ids"; for the digest of the data also all of them in
    this order as "input_ids", and as "labels" with -100 for the prompt's. It is left out where the prompt
    alone fills `max_length`; TRL cuts the answers.

    Args, Raises: see `instruction_splits`.
    """
    _check(options)
    if options.packing:
        raise OptionError("packing", "an `objective` of texts or answers", "one of preferences")
    if options.loss_on not in (None, "completion"):
        raise OptionError("loss_on", "completion for preferences", options.loss_on)
    data, evaluation = _read(options)
    read = _example_splits(options, tokenizer, data, evaluation, seed, PREFERENCE)
    tokeniser = Tokeniser(tokenizer, read.template)
    training, of_training = _pairs(read.training, tokeniser, options.max_length)
    evaluated, of_evaluation = _pairs(read.evaluation, tokeniser, options.max_length)
    return _checked(Splits(training, evaluated, read.summary(of_training, of_evaluation)))


def read_examples(options: DataOptions, tokenizer: Any, seed: int, shapes: Sequence[str]) -> ExampleSplits:
    """Return the examples of records of some shapes, held-out ones apart, before they are tokens.

    Args:    shapes: names in `qpa.training.data.shapes.SHAPES`, in the order in which they are looked for.
    Raises:  DataError, OptionError: see `instruction_splits`.
    """
    _check(options)
    return _example_splits(options, tokenizer, *_read(options), seed, shapes)


def cut_blocks(tokens: Sequence[int], max_length: int) -> list[list[int]]:
    """Cut a token stream into blocks of at most `max_length` tokens; a last block of one token is dropped."""
    blocks = [list(tokens[start : start + max_length]) for start in range(0, len(tokens), max_length)]
    return [block for block in blocks if len(block) > 1]


def _check(options: DataOptions) -> None:
    if options.max_length < 2:
        raise OptionError("max_length", "at least 2 tokens", str(options.max_length))


def _read(options: DataOptions) -> tuple[Sources, Sources | None]:
    data = read_sources(names_of(options.data), options.data_revision)
    if not options.eval_data:
        return data, None
    return data, read_sources(names_of(options.eval_data), options.data_revision)


# Records


def _example_splits(
    options: DataOptions,
    tokenizer: Any,
    data: Sources,
    evaluation: Sources | None,
    seed: int,
    shapes: Sequence[str],
) -> ExampleSplits:
    template = ChatTemplate(tokenizer, options.chat_template)
    reader = ShapeReader(shapes, options.columns, has_template=template.exists)
    if data.texts:
        expected = f"rows, as in {evaluation.subject}" if evaluation else "rows"
        raise DataError(data.subject, expected, "text")
    training = _examples(data, reader)
    if evaluation is None:
        splits = _held_out(data.subject, training, options.eval_share, seed)
    elif evaluation.texts:
        expected = f"rows of shape {reader.shape}, as in {data.subject}"
        raise DataError(evaluation.subject, expected, "text")
    else:
        splits = training, _examples(evaluation, reader)
    hub = dict.fromkeys((*data.hub, *(evaluation.hub if evaluation else ())))
    return ExampleSplits(*splits, reader.shape, template, tuple(hub))


def _examples(sources: Sources, reader: ShapeReader) -> Examples:
    found = [reader.read(record) for record in sources.records]
    examples = [example for example in found if example is not None]
    if not examples:
        raise DataError(sources.subject, "rows with something to learn", f"{len(found)} empty ones")
    return Examples(examples, len(found) - len(examples))


def _held_out(subject: str, found: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Return all examples but a share, and this share, drawn with a seed; each in its order."""
    examples = found.examples
    if len(examples) < 2:
        raise DataError(subject, "at least 2 rows, one to train and one to evaluate", str(len(examples)))
    n_eval = min(max(1, round(share * len(examples))), len(examples) - 1)
    held_out = set(random.Random(seed).sample(range(len(examples)), n_eval))
    training = [example for index, example in enumerate(examples) if index not in held_out]
    evaluation = [example for index, example in enumerate(examples) if index in held_out]
    return Examples(training, found.n_empty), Examples(evaluation, 0)


def _rows(found: Examples, tokeniser: Tokeniser, max_length: int) -> tuple[list[Row], SplitSummary]:
    """Return the cut rows that carry a loss, and count the others."""
    rows: list[Row] = []
    lengths: list[int] = []
    n_lost, n_silent = 0, 0
    for example in found.examples:
        whole = tokeniser.row(example)
        lengths.append(len(whole["input_ids"]))
        row = cut(whole, max_length)
        if has_loss(row):
            rows.append(row)
        elif has_loss(whole):
            n_lost += 1
        else:
            n_silent += 1
    return rows, _summary(rows, lengths, max_length, n_lost, n_silent, found.n_empty)


def _pairs(found: Examples, tokeniser: Tokeniser, max_length: int) -> tuple[list[Row], SplitSummary]:
    pairs = [tokeniser.pair(example) for example in found.examples if isinstance(example, Preference)]
    rows = [_with_labels(pair) for pair in pairs]
    kept = [row for row in rows if len(row["prompt_ids"]) < max_length]
    lengths = [len(row["prompt_ids"]) + len(row[answer]) for row in rows for answer in ANSWERS]
    return kept, _summary(kept, lengths, max_length, len(rows) - len(kept), 0, found.n_empty)


def _with_labels(pair: Row) -> Row:
    answers = pair["chosen_ids"] + pair["rejected_ids"]
    prompt = pair["prompt_ids"]
    return {**pair, "input_ids": prompt + answers, "labels": [IGNORED] * len(prompt) + answers}


def _is_chat(example: Example) -> bool:
    return isinstance(example.chosen if isinstance(example, Preference) else example, Conversation)


# Texts


def _stream_splits(options: DataOptions, tokenizer: Any, data: Sources, evaluation: Sources | None) -> Splits:
    for name, value in (("columns", options.columns), ("chat_template", options.chat_template)):
        if value:
            raise OptionError(name, "no such option for text files", str(value), "leave it out")
    if options.loss_on not in (None, "all"):
        raise OptionError("loss_on", "all for text files", options.loss_on)
    tokens = _stream(data, tokenizer)
    if evaluation is None:
        n_eval = max(2, round(options.eval_share * len(tokens)))
        if len(tokens) - n_eval < 2:
            expected = "at least 4 tokens, to train and to evaluate"
            raise DataError(data.subject, expected, f"{len(tokens)}: too short")
        streams = tokens[:-n_eval], tokens[-n_eval:]
    else:
        streams = tokens, _stream(evaluation, tokenizer)
    blocks = [cut_blocks(stream, options.max_length) for stream in streams]
    training, evaluated = ([{"input_ids": ids, "labels": list(ids)} for ids in split] for split in blocks)
    summary = DataSummary(
        shape=STREAM,
        hub=(),
        chat_template=None,
        training=_summary(training, (), options.max_length, 0, 0, 0),
        evaluation=_summary(evaluated, (), options.max_length, 0, 0, 0),
    )
    return _packed(options, Splits(training, evaluated, summary))


def _stream(sources: Sources, tokenizer: Any) -> list[int]:
    """Return the tokens of texts that follow each other, with an end-of-text token between them."""
    tokeniser = Tokeniser(tokenizer, ChatTemplate(tokenizer, None))
    tokens: list[int] = []
    for number, (_, text) in enumerate(sources.texts):
        if number and tokens[-1:] != [tokenizer.eos_token_id]:
            tokens.append(tokenizer.eos_token_id)
        tokens += tokeniser.tokens(text)
    if len(tokens) < 2:
        raise DataError(sources.subject, "at least 2 tokens", f"{len(tokens)}: too short")
    return tokens


# Both


def _summary(
    rows: Sequence[Row], lengths: Sequence[int], max_length: int, n_lost: int, n_silent: int, n_empty: int
) -> SplitSummary:
    """Count the rows that are left of those that had so many tokens before they were cut."""
    return SplitSummary(
        n_rows=len(rows),
        n_unpacked=len(rows),
        n_tokens=sum(len(row["input_ids"]) for row in rows),
        n_loss_tokens=sum(label != IGNORED for row in rows for label in row["labels"][1:]),
        n_cut_rows=sum(length > max_length for length in lengths),
        n_cut_tokens=sum(max(0, length - max_length) for length in lengths),
        n_lost_rows=n_lost,
        n_silent_rows=n_silent,
        n_empty_rows=n_empty,
    )


def _packed(options: DataOptions, splits: Splits) -> Splits:
    """Pack the training rows where that is asked for; evaluation rows stay, so that losses compare."""
    splits = _checked(splits)
    if not options.packing or splits.summary is None:
        return splits
    rows = pack_rows(splits.training, options.max_length)
    training = splits.summary.training.model_copy(update={"n_rows": len(rows)})
    return Splits(rows, splits.evaluation, splits.summary.model_copy(update={"training": training}))


def _checked(splits: Splits) -> Splits:
    for name, rows in (("training", splits.training), ("evaluation", splits.evaluation)):
        counts = getattr(splits.summary, name)
        if not rows and counts.n_silent_rows and not counts.n_lost_rows:
            raise DataError(f"the {name} split", "an answer that carries the loss", "none", "see `loss_on`")
        if not rows:
            expected, advice = "a completion within `max_length`", "raise `max_length`"
            raise DataError(f"the {name} split", expected, "none", advice)
    return splits
