"""Read training text and say exactly what is wrong with it.

Two kinds of file, both in UTF-8, with or without a byte order mark:
1. Rows (suffix .jsonl, .ndjson or .json, in any case): one JSON object a line, or in a .json file also one
   array of objects; all with "text", or all with "prompt" and "completion". Tokenised, truncated and masked
   in `qpa.training.token_rows`: the prompt carries no loss.
2. Any other file is one text. It is tokenised once and cut into blocks of `max_length` tokens; the last
   block may be shorter.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpa.errors import DataError, OptionError

EVAL_SHARE = 0.1
Row = dict[str, Any]

_EXPECTED = 'an object with "text", or with "prompt" and "completion"'


def read_splits(
    data: Path, eval_data: Path | None, tokenizer: Any, max_length: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, evaluation rows).

    Without `eval_data` the evaluation split is a tenth of `data`: the end of a text, or rows drawn with
    `seed`.

    Args:    tokenizer: of the base model; used for text files only.
             max_length: tokens per block of a text file.
    Returns: rows with "input_ids" from text, or with the strings of a file of rows.
    Raises:  DataError: a file is missing, empty, binary, not UTF-8, too short, or has a broken row.
             OptionError: max_length is below 2.
    """
    if max_length < 2:
        raise OptionError("max_length", "at least 2 tokens", str(max_length))
    if eval_data is not None:
        train, evaluation = (_read(path, tokenizer, max_length) for path in (data, eval_data))
        if train[0].keys() != evaluation[0].keys():
            raise DataError(
                str(eval_data), f"rows with {sorted(train[0])}, as in {data}", str(sorted(evaluation[0]))
            )
        return train, evaluation
    if _has_rows(data):
        return _split_rows(data, _read_rows(data), seed)
    return _split_tokens(data, _tokenise(data, tokenizer), max_length)


def _read(path: Path, tokenizer: Any, max_length: int) -> list[Row]:
    if _has_rows(path):
        return _read_rows(path)
    return cut_blocks(_tokenise(path, tokenizer), max_length)


def _has_rows(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson", ".json")


def _split_rows(path: Path, rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    if len(rows) < 2:
        raise DataError(str(path), "at least 2 rows, one to train and one to evaluate", str(len(rows)))
    n_eval = max(1, round(EVAL_SHARE * len(rows)))
    held_out = set(random.Random(seed).sample(range(len(rows)), n_eval))
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def _split_tokens(path: Path, tokens: list[int], max_length: int) -> tuple[list[Row], list[Row]]:
    n_eval = max(2, round(EVAL_SHARE * len(tokens)))
    if len(tokens) - n_eval < 2:
        raise DataError(str(path), "at least 4 tokens, to train and to evaluate", f"{len(tokens)}: too short")
    return cut_blocks(tokens[:-n_eval], max_length), cut_blocks(tokens[-n_eval:], max_length)


def cut_blocks(tokens: list[int], max_length: int) -> list[Row]:
    """Cut a token stream into rows of at most `max_length` tokens; a last row of one token is dropped."""
    blocks = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    return [{"input_ids": block} for block in blocks if len(block) > 1]


def _tokenise(path: Path, tokenizer: Any) -> list[int]:
    tokens: list[int] = tokenizer(_read_text(path), verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise DataError(str(path), "at least 2 tokens", f"{len(tokens)}: too short")
    return tokens


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(str(path), "a text or jsonl file", "a directory" if path.is_dir() else "no such file")
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(str(path), "UTF-8 text", "UTF-16 text", "convert it to UTF-8")
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(str(path), "text", "an empty file")
    if b"\0" in raw:
        raise DataError(str(path), "text", f"binary data (byte 0 at offset {raw.index(0)})")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            str(path),
            "UTF-8 text",
            f"byte {raw[error.start]:#04x} at offset {error.start}",
            "convert it to UTF-8",
        ) from error


def _read_rows(path: Path) -> list[Row]:
    text = _read_text(path)
    is_array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    rows: list[Row] = []
    for subject, content in _entries(path, text) if is_array else _lines(path, text):
        row = _check_row(subject, content)
        if rows and row.keys() != rows[0].keys():
            before = f"{_names(rows[0])}, as in the {'entries' if is_array else 'lines'} before"
            raise DataError(subject, before, _names(row))
        rows.append(row)
    if not rows:
        raise DataError(str(path), "text", "an empty array" if is_array else "an empty file")
    return rows


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the content of every line that is not blank, with its number as an error names it."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            subject = f"{path}, line {number}"
            yield subject, _parse(subject, _EXPECTED, line)


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a JSON array, with their numbers as an error names them."""
    entries = _parse(str(path), "a JSON array of objects", text)
    for number, entry in enumerate(entries, start=1):
        yield f"{path}, entry {number}", entry


def _parse(subject: str, expected: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(subject, expected, f"broken JSON ({error})") from error


def _check_row(subject: str, content: Any) -> Row:
    if not isinstance(content, dict):
        raise DataError(subject, _EXPECTED, type(content).__name__)
    keys = ("prompt", "completion") if "prompt" in content and "completion" in content else ("text",)
    row = {key: content.get(key) for key in keys}
    for key, value in row.items():
        if not isinstance(value, str):
            found = f'"{key}" is {type(value).__name__}' if key in content else _names(content)
            raise DataError(subject, _EXPECTED, found)
        if not value.strip() and key != "prompt":
            raise DataError(subject, _EXPECTED, f'"{key}" is empty')
        _check_surrogates(subject, key, value)
    return row


def _check_surrogates(subject: str, key: str, value: str) -> None:
    """Refuse what JSON can say and UTF-8 cannot: an escape such as \\ud83d without its other half."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(value[error.start]):04x}"
        found = f'half of a surrogate pair in "{key}" ({escape})'
        raise DataError(subject, "whole characters", found, "remove it, or complete the pair") from error


def _names(row: Row) -> str:
    return "keys " + ", ".join(f'"{key}"' for key in sorted(row)[:6]) if row else "an empty object"
