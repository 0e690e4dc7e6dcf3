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


def data_rows(data: DataSummary, max_length: int | None = None) -> Rows:
    """Return what each split holds and what was cut or left out, under the words of `DATA_HEADER`.

    A count that is 0 in both is left out, and so are rows before packing where none were packed.

    Args:    max_length: tokens that fit a row, to say of packed rows how full they are.
    """
    splits = (data.training, data.evaluation)
    is_packed = any(split.n_rows != split.n_unpacked for split in splits)
    shown = {words: [getattr(split, name) for split in splits] for words, name in _COUNTS.items()}
    if not is_packed:
        del shown["rows before packing"]
    rows = [(words, *map(number, counts)) for words, counts in shown.items() if any(counts)]
    if is_packed and max_length:
        shares = [split.n_tokens / max(1, split.n_rows * max_length) for split in splits]
        rows.append(("filled by tokens", *(f"{share:.0%}" for share in shares)))
    return rows


def data_text(data: DataSummary) -> str:
    """Return in a line what was cut and left out of the training split, and what was read from the Hub."""
    split = data.training
    left_out = split.n_lost_rows + split.n_silent_rows + split.n_empty_rows
    parts = [f"{number(split.n_unpacked)} rows"]
    if split.n_unpacked != split.n_rows:
        parts.append(f"packed into {number(split.n_rows)}")
    if split.n_cut_rows:
        parts.append(f"{number(split.n_cut_tokens)} tokens cut off {number(split.n_cut_rows)} rows")
    if left_out:
        parts.append(f"{number(left_out)} rows left out")
    parts += [f"{one.name} at {one.revision[:12]}" for one in data.hub if one.revision]
    return ", ".join(parts)
