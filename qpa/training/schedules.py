"""How learning rates go on from their peak, after a linear warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from qpa.registry import Registry


@dataclass(frozen=True)
class Schedule:
    """A schedule of transformers.

    Args:    scheduler: its name there.
             words: what it does, for help.
    """

    scheduler: str
    words: str


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {
        "cosine": "qpa.training.schedules:COSINE",
        "linear": "qpa.training.schedules:LINEAR",
        "constant": "qpa.training.schedules:CONSTANT",
    },
)

COSINE = Schedule("cosine", "down to zero along half a cosine")
LINEAR = Schedule("linear", "down to zero along a line")
CONSTANT = Schedule("constant_with_warmup", "they stay there")
