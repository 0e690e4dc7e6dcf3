"""What another library says becomes one whole sentence."""

from __future__ import annotations

import pytest

from qpa.errors import last_sentence, one_sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("The hidden size is odd."), "The hidden size is odd"),
        (
            ValueError(
                "Couldn't load it from one of: \n(1) a file, \n(2) a slow tokenizer or \n(3) a class.\nUse x."
            ),
            "Couldn't load it from one of: (1) a file, (2) a slow tokenizer or (3) a class",
        ),
        (ImportError("\nX requires timm. You can install it with pip:\n`pip install timm`. Note that"), None),
        (OSError("It is not on the Hub\nIf it is private, log in."), "It is not on the Hub"),
        (
            OSError(
                "404 Client Error. (Request ID: Root=1-2;3)\n\nRepository Not Found for url: https://x/y.\nPlease"
            ),
            "Repository Not Found for url: https://x/y",
        ),
        (ValueError("It ends with nothing:"), "It ends with nothing"),
        (KeyError("num_heads"), "'num_heads' (KeyError)"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError(" \n "), "RuntimeError"),
        ("", "no message"),
        ("Killed", "Killed"),
    ],
    ids=str,
)
def test_a_message_becomes_a_whole_sentence(error, sentence):
    expected = sentence or "X requires timm. You can install it with pip: `pip install timm`. Note that"
    assert one_sentence(error) == expected


@pytest.mark.parametrize("text", ["many words " * 100, "x" * 1000, "one " + "x" * 1000])
def test_a_long_message_is_cut_between_words_and_says_so(text):
    cut = one_sentence(text, limit=50)
    assert len(cut) <= 50 and cut.endswith(" ..")
    assert text.startswith(cut.removesuffix(" ..")) and not cut.removesuffix(" ..").endswith(" ")


def test_a_message_as_long_as_the_limit_stays_whole():
    assert one_sentence("many words", limit=10) == "many words"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("the first line\nthe last line.\n", "the last line"),
        ("the first line\none of:\n(1) a file or\n(2) a class", "one of: (1) a file or (2) a class"),
        ("", "no message"),
    ],
)
def test_a_text_ends_with_a_whole_sentence(text, sentence):
    assert last_sentence(text) == sentence
