"""Read training text and say exactly what is wrong with it.

Two kinds of file:
1. jsonl (suffix .jsonl, .ndjson or .json, in any case): one object a line, all with "text", or all with
   "prompt" and "completion". Tokenised, truncated and masked by TRL's SFTTrainer: the prompt carries no
   loss.
2. Any other file is one UTF-8 text. It is tokenised once and cut into blocks of `max_length` tokens;
   the last block may be shorter.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from qpa.errors import DataError, OptionError

EVAL_SHARE = 0.1
Row = dict[str, Any]


def read_splits(
    data: Path, eval_data: Path | None, tokenizer: Any, max_length: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, evaluation rows).

    Without `eval_data` the evaluation split is a tenth of `data`: the end of a text, or jsonl rows drawn
    with `seed`.

    Args:    tokenizer: of the base model; used for text files only.
             max_length: tokens per block of a text file.
    Returns: rows with "input_ids" from text, or with the strings of the jsonl file.
    Raises:  DataError: a file is missing, empty, binary, not UTF-8, too short, or has a broken line.
             OptionError: max_length is below 2.
    """
    if max_length < 2:
        raise OptionError("--max-length", "at least 2 tokens", str(max_length))
    if eval_data is not None:
        train, evaluation = (_read(path, tokenizer, max_length) for path in (data, eval_data))
        if train[0].keys() != evaluation[0].keys():
            raise DataError(
                str(eval_data), f"rows with {sorted(train[0])}, as in {data}", str(sorted(evaluation[0]))
            )
        return train, evaluation
    if _is_jsonl(data):
        return _split_rows(data, _read_jsonl(data), seed)
    return _split_tokens(data, _tokenise(data, tokenizer), max_length)


def _read(path: Path, tokenizer: Any, max_length: int) -> list[Row]:
    if _is_jsonl(path):
        return _read_jsonl(path)
    return cut_blocks(_tokenise(path, tokenizer), max_length)


def _is_jsonl(path: Path) -> bool:
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
    if not raw.strip():
        raise DataError(str(path), "text", "an empty file")
    if b"\0" in raw:
        raise DataError(str(path), "text", f"binary data (byte 0 at offset {raw.index(0)})")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            str(path),
            "UTF-8 text",
            f"byte {raw[error.start]:#04x} at offset {error.start}",
            "convert it to UTF-8",
        ) from error


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_line(f"{path}, line {number}", line)
        if rows and row.keys() != rows[0].keys():
            raise DataError(
                f"{path}, line {number}", f"{_names(rows[0])}, as in the lines before", _names(row)
            )
        rows.append(row)
    if not rows:
        raise DataError(str(path), "text", "an empty file")
    return rows


def _parse_line(subject: str, line: str) -> Row:
    expected = 'an object with "text", or with "prompt" and "completion"'
    try:
        content = json.loads(line)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DataError(subject, expected, f"broken JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(subject, expected, type(content).__name__)
    keys = ("prompt", "completion") if "prompt" in content and "completion" in content else ("text",)
    row = {key: content.get(key) for key in keys}
    for key, value in row.items():
        if not isinstance(value, str):
            raise DataError(
                subject, expected, f'"{key}" is {type(value).__name__}' if key in content else _names(content)
            )
        if not value.strip() and key != "prompt":
            raise DataError(subject, expected, f'"{key}" is empty')
    return row


def _names(row: Row) -> str:
    return "keys " + ", ".join(f'"{key}"' for key in sorted(row)[:6]) if row else "an empty object"
