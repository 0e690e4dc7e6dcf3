"""What SIGTERM means: the program ends in good order, with exit code 143, and a second SIGTERM kills it.

    with ending_on_sigterm():                       everywhere: `Terminated` is raised at once
        with deferring_sigterm() as asks_to_end:    in a training: the step under way is finished first
            ...
            if asks_to_end(): save, and raise Terminated

Schedulers of clusters send SIGTERM before they take a machine away. Whoever sends it twice does not want to
wait. Handlers can be set in a process's main thread alone; in another thread, both do nothing.

Source: ours.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The program was asked to end, and ends; it is no error, and nothing is wrong with the input.

    Args:    saved: what is kept, and how to go on; may be empty.
    """

    def __init__(self, saved: str = "") -> None:
        super().__init__(EXIT_CODE)
        self.saved = saved


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` in the block when SIGTERM comes."""

    def end() -> None:
        raise Terminated

    with _on_first_sigterm(end):
        yield


@contextmanager
def deferring_sigterm() -> Iterator[Callable[[], bool]]:
    """Keep SIGTERM from the block, and yield a function that tells whether it came."""
    came = threading.Event()
    with _on_first_sigterm(came.set):
        yield came.is_set


@contextmanager
def _on_first_sigterm(act: Callable[[], object]) -> Iterator[None]:
    """Act when the first SIGTERM comes; the next one does what it does by default: it kills."""

    def handle(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        act()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, before)
