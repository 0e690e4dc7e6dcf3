"""The one family of errors a user of qpa can meet.

Every message has four parts: the subject, what was expected, what was found, and what to do next.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_GOES_ON = (":", ",", ";", "(", " or", " and")
_STATUS_LINE = re.compile(r"\d{3} (Client|Server) Error\b.*Request ID.*")


def one_of(words: Sequence[str]) -> str:
    """Return "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def one_sentence(error: BaseException | str, limit: int = 300) -> str:
    """Return what another library says, as one whole sentence without its full stop.

    Rules:
    1. Of several lines the first counts, with the lines after it for as long as the text plainly goes on:
       it ends with a colon, a comma, "or" and the like.
    2. The line with an HTTP status and a request id, which the Hub's client puts first, is left out.
    3. The message of a KeyError is the key alone, so " (KeyError)" is added to it.
    4. A text of more than `limit` characters is cut at the end of a word, and " .." is added to it.

    Args:    error: the exception, or its text where it came out of another process.
             limit: the largest number of characters.
    """
    kind = "" if isinstance(error, str) else type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and _STATUS_LINE.fullmatch(lines[0]):
        del lines[0]
    if not lines:
        return kind or "no message"
    text, *others = lines
    while others and text.endswith(_GOES_ON):
        text = f"{text} {others.pop(0)}"
    text = text.rstrip(".:") or text
    if isinstance(error, KeyError):
        text = f"{text} (KeyError)"
    return text if len(text) <= limit else f"{_cut(text, limit - 3)} .."


def last_sentence(text: str, limit: int = 300) -> str:
    """Return how a text of several lines ends, as `one_sentence` does how one begins.

    It is the last line, with those before it that plainly go on.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = max(0, len(lines) - 1)
    while start and lines[start - 1].endswith(_GOES_ON):
        start -= 1
    return one_sentence("\n".join(lines[start:]), limit)


def _cut(text: str, limit: int) -> str:
    """Return the start of a text, up to the end of a word where there is one."""
    head, space, _ = text[: limit + 1].rpartition(" ")
    return head if space else text[:limit]


class QpaError(Exception):
    """Report bad input in one line.

    Args:    subject: the file, option or object that is wrong.
             expected: what would have been right.
             found: what is there instead.
             advice: what to do next; may be empty.
    Source:  ours.
    """

    def __init__(self, subject: str, expected: str, found: str, advice: str = "") -> None:
        message = f"{subject}: expected {expected}, found {found}" + (f"; {advice}" if advice else "")
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in message).split()))
        self.subject = subject
        self.expected = expected
        self.found = found
        self.advice = advice

    def with_advice(self, *more: str) -> Self:
        """Return the same error with further advice behind its own."""
        advice = "; ".join(filter(None, (self.advice, *more)))
        return type(self)(self.subject, self.expected, self.found, advice)


class OptionError(QpaError):
    """An option's value is out of range or does not fit the model.

    The subject is the name of the option's field. Where the message names other options, it has their fields
    in backticks, since a Python caller knows no flags. The command line turns both into flags.
    """


def unknown_name(option: str, known: Sequence[str], name: str) -> OptionError:
    """Return the error for a name that an option does not know, with the nearest name that it knows."""
    near = difflib.get_close_matches(name, known, n=1)
    return OptionError(option, one_of(known), name, f"did you mean {near[0]}?" if near else "")


class DirectoryError(OptionError):
    """A directory that an option names is taken, in use, or no run or export; the subject is its path."""


class ConfigurationError(QpaError):
    """A configuration file is wrong; the subject is its name with the line, and with the option."""


class ModelError(QpaError):
    """A base model is missing, is no model, or cannot carry the adapter."""


class DataError(QpaError):
    """Data cannot be used for training or evaluation; the subject is its file, with the line or row."""


class ShapeError(QpaError):
    """A tensor does not have the shape that the circuit or layout prescribes."""


class DocumentError(QpaError):
    """A document, or a file it names, is missing, edited, truncated, stale or newer than this qpa."""


class StaleError(DocumentError):
    """A document of a run is not there, or was made from another one than the one that is there."""


class PipelineError(QpaError):
    """Passes are composed in an order in which they cannot run."""


class TargetError(QpaError):
    """A circuit cannot be transpiled to the chosen target."""


class DiskFullError(QpaError, OSError):
    """A disk, or the user's share of it, has no room for a file.

    It is an OSError too, as callers expect of functions that write files.

    Args:    path: the file or directory.
             n_bytes: the least that the file needs; 0 where it needs only an entry in its directory.
             n_free: the bytes that are free where the file was to be written.
             reason: the system's own words for the error.
    """

    def __init__(
        self,
        path: Path,
        n_bytes: int,
        n_free: int,
        reason: str,
        advice: str = "free some space and run the same command again",
    ) -> None:
        expected = f"room for at least {n_bytes:,} bytes" if n_bytes else "room for one more file"
        super().__init__(str(path), expected, f"{n_free:,} bytes free ({reason})", advice)
        self.errno, self.strerror, self.filename = errno.ENOSPC, reason, str(path)
        self.path, self.n_bytes, self.n_free, self.reason = path, n_bytes, n_free, reason

    def __str__(self) -> str:
        """Return the whole message, of which an OSError would show less."""
        return str(self.args[0])

    def advising(self, advice: str) -> DiskFullError:
        """Return the same error with other advice."""
        return DiskFullError(self.path, self.n_bytes, self.n_free, self.reason, advice)


class DivergedError(QpaError):
    """Training produced a gradient or loss that is not finite."""


class CheckpointError(QpaError):
    """A checkpoint is missing, incomplete, or belongs to another training."""


class OtherDataError(CheckpointError):
    """A checkpoint is of the same training, on other data."""


class ExportError(QpaError):
    """An adapter cannot be written, or would not be served right."""


class VerificationError(QpaError):
    """An exported adapter is not the function that was trained."""


class ProcessError(QpaError):
    """Processes that train together cannot go on: one has ended, or they do not agree."""


class SourceError(QpaError):
    """What runs the circuits fails: a device is not reached, a job is cancelled, shots are missing."""
