"""Rows of text as rows of tokens with labels, the same as TRL's SFTTrainer makes of them.

TRL prepares rows only inside a trainer, whose construction changes the model. Here no model is needed, so
that every trainer, whoever wrote it, and every score see the same rows.

Rules:
1. The end-of-text token follows a text, or a completion, that does not end with it already.
2. A prompt and its completion are tokenised as one text. The completion begins where the tokens of both part
   from those of the prompt alone; what stands before it carries no loss.
3. Rows are cut to `max_length` tokens, and a row without a label left is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from qpa.training.evaluation import IGNORED
from qpa.training.text_data import Row


def tokenise_rows(rows: Iterable[Row], tokenizer: Any, max_length: int) -> list[Row]:
    """Return rows with "input_ids" and "labels", which are token ids, or -100 where there is no loss.

    Args:    rows: with "text", with "prompt" and "completion", or with "input_ids" already, which all count.
             tokenizer: of transformers, with an end-of-text token.
    """
    cut = [_cut(_labelled(row, tokenizer), max_length) for row in rows]
    return [row for row in cut if any(label != IGNORED for label in row["labels"])]


def _labelled(row: Row, tokenizer: Any) -> Row:
    if "input_ids" in row:
        return {"input_ids": row["input_ids"], "labels": row["input_ids"]}
    prompt = row.get("prompt", "")
    completion = _ended(row["completion"] if "prompt" in row else row["text"], tokenizer.eos_token)
    ids = _tokens(prompt + completion, tokenizer)
    n_prompt = _n_common(_tokens(prompt, tokenizer), ids) if "prompt" in row else 0
    return {"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]}


def _cut(row: Row, max_length: int) -> Row:
    return {name: values[:max_length] for name, values in row.items()}


def _ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _tokens(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _n_common(left: list[int], right: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
