"""What a user may ask of the data: the options of a training that say which rows there are."""

from __future__ import annotations

from dataclasses import dataclass

from qpa.pipeline.options import option


@dataclass(frozen=True)
class DataOptions:
    """The options of the data.

    Args:    data, eval_data: text or jsonl files, see `qpa.training.text_data`.
             max_length: tokens per row.
    """

    # What the files hold is pinned by a digest; where they are changes nothing.
    data: str = option(
        help='Text, or jsonl with "text" or with "prompt" and "completion".', is_path=True, provenance=False
    )
    eval_data: str | None = option(
        None,
        help="Text or jsonl file to evaluate on.",
        is_path=True,
        shown_default="a tenth of `data`, held out",
        provenance=False,
    )
    max_length: int = option(256, help="Tokens per row.", at_least=2, unit="tokens")
