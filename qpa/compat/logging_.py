"""What qpa uses of the standard library's logging beyond its documentation, as seen in Python 3.11."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_logs(level: int) -> Iterator[None]:
    """Suppress all log records up to a level, and afterwards only those that were suppressed before."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)
