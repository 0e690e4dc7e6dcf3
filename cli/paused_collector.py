"""Keep the garbage collector away from what imports leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the garbage collector, and let it pass over what is there from then on.

    This is for a short process that spends its time on imports. Modules live as long as the process, so a
    collector that walks over them again and again, the last time at exit, finds next to nothing to free.
    Afterwards the collector is on if it was on before, for what comes later. Objects without references
    are freed as ever; only cycles among the objects that existed by then are not.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
