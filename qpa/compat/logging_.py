"""What qpa uses of the standard library's logging beyond its documentation, as seen in Python 3.11."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_logs(level: int) -> Iterator[None]:
    """Keep all records up to a level away, and afterwards only those that were kept away before."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)
