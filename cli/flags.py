"""Fields as a Python caller knows them, and flags as the command line shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qpa.errors import DirectoryError, OptionError, QpaError


def flag_of(name: str) -> str:
    """Return the flag of an option by its name, such as --max-steps for "max_steps"."""
    return "--" + name.strip("_").replace("_", "-")


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a text with flags in place of the options that it names in backticks; other words stay."""
    return re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), text)


def error_line(error: QpaError, flags: Mapping[str, str]) -> str:
    """Return an error's message as the command line shows it."""
    message = with_flags(str(error), flags)
    if isinstance(error, OptionError) and not isinstance(error, DirectoryError) and error.subject in flags:
        return flags[error.subject] + message.removeprefix(error.subject)
    return message
