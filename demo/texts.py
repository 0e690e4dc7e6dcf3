"""Two seeded grammars about one lighthouse: a diary in plain prose, and telegrams.

Every word of the telegrams is in the diary too, a fifth of which is notes: a few words in no order. What a
model of the diary does not expect is the telegrams' syntax: a shift of domain, not of vocabulary.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("dawn", "noon", "dusk", "midnight")
WINDS = ("calm", "fresh", "bitter", "wild", "warm")
QUARTERS = ("north", "south", "east", "west")
NUMBERS = ("two", "three", "four", "seven", "nine")
VISITORS = ("boats", "seals", "gulls", "whales", "trawlers")
PLACES = ("pier", "reef", "bay", "cave", "island")
DEEDS = ("mends", "paints", "oils", "polishes", "forgets")
COLOURS = ("red", "green", "grey", "silver", "black")
THINGS = ("lamp", "kettle", "door", "bell", "ladder")
PEOPLE = ("keeper", "captain", "cook", "doctor", "sister")
MEALS = ("soup", "bread", "tea", "pie", "porridge")
WORDS = (
    *("stop", "send", "near", "wind"),
    *(DAYS + HOURS + WINDS + QUARTERS + NUMBERS + VISITORS + PLACES),
    *(DEEDS + COLOURS + THINGS + PEOPLE + MEALS),
)
NOTE_SHARE = 0.2

Draw = Callable[[Sequence[Any]], Any]


def diary(seed: int, n_lines: int) -> str:
    """Return `n_lines` lines of the keeper's diary, the text the base model is trained on."""
    generator = random.Random(f"diary {seed}")
    lines = (_note if generator.random() < NOTE_SHARE else _diary_line for _ in range(n_lines))
    return "".join(f"{line(generator.choice)}\n" for line in lines)


def telegrams(seed: int, n_lines: int) -> str:
    """Return `n_lines` telegrams of the same station, the text to adapt to."""
    draw = random.Random(f"telegrams {seed}").choice
    return "".join(f"{_telegram(draw)}\n" for _ in range(n_lines))


def _diary_line(draw: Draw) -> str:
    sentences = (
        f"On {draw(DAYS)} at {draw(HOURS)} the wind is {draw(WINDS)} and comes from the {draw(QUARTERS)}.",
        f"We see {draw(NUMBERS)} {draw(VISITORS)} that stop near the {draw(PLACES)}.",
        f"The {draw(PEOPLE)} {draw(DEEDS)} the {draw(COLOURS)} {draw(THINGS)}.",
        f"Then I send {draw(MEALS)} to the {draw(PEOPLE)} on the {draw(PLACES)}.",
    )
    return " ".join(sentences)


def _note(draw: Draw) -> str:
    return " ".join(draw(WORDS) for _ in range(draw(range(4, 16))))


def _telegram(draw: Draw) -> str:
    phrases = (
        f"{draw(QUARTERS)} wind {draw(WINDS)} {draw(DAYS)} {draw(HOURS)}",
        f"{draw(VISITORS)} near {draw(PLACES)} {draw(NUMBERS)}",
        f"{draw(THINGS)} {draw(COLOURS)} {draw(PEOPLE)} {draw(DEEDS)}",
        f"send {draw(PLACES)} {draw(MEALS)}",
    )
    return " stop ".join(phrases) + " stop"


def main() -> None:
    """Write telegrams to adapt to, and others to measure on, into the directory named on the command line."""
    parser = argparse.ArgumentParser(description="Write the demonstration's texts.")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, seed, n_lines in (("telegrams.txt", 0, 3000), ("telegrams-held-out.txt", 1, 200)):
        text = telegrams(seed, n_lines)
        (directory / name).write_text(text)
        print(f"wrote {directory / name}: {n_lines:,} telegrams, the first: {text.splitlines()[0]}")


if __name__ == "__main__":
    main()
