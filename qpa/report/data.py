"""What a training's data was, as rows for a table."""

from __future__ import annotations

from qpa.documents import DataSummary
from qpa.report.rows import Rows, number

DATA_HEADER = ("", "training", "evaluation")


_COUNTS = {
    "rows": "n_rows",
    "rows before packing": "n_unpacked",
    "tokens": "n_tokens",
    "tokens with a loss": "n_loss_tokens",
    "rows that were cut": "n_cut_rows",
    "tokens beyond the cuts": "n_cut_tokens",
    "left out, as all that carries a loss was cut": "n_lost_rows",
    "left out, as nothing carries a loss": "n_silent_rows",
    "left out, as empty": "n_empty_rows",
}


def data_rows(data: DataSummary) -> Rows:
    """Return what each split holds and what was cut or left out, under the words of `DATA_HEADER`.

    A count that is 0 in both is left out, and so are rows before packing where none were packed.
    """
    splits = (data.training, data.evaluation)
    is_packed = any(split.n_rows != split.n_unpacked for split in splits)
    shown = {words: [getattr(split, name) for split in splits] for words, name in _COUNTS.items()}
    if not is_packed:
        del shown["rows before packing"]
    return [(words, *map(number, counts)) for words, counts in shown.items() if any(counts)]
