"""Where the runs of a bench are made: in this process, in processes beside it, or on a cluster by Ray.

Every run has one thread, so its sums have one order, and its result is the same wherever it is made. A
cluster needs qpa with the extra "ray" on every machine, and the model and the texts at the same paths.

Source:  ours; Ray (Moritz et al., OSDI 2018).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from qpa.errors import OptionError, one_sentence

RAY = "ray"


class Workers(NamedTuple):
    """Where runs are made.

    Args:    n: processes on this machine; 1 is this process alone.
             ray: the address of a Ray cluster instead; "" is the one that the variable RAY_ADDRESS names, or
             else one that is started on this machine and ended afterwards.
    """

    n: int = 1
    ray: str | None = None


HERE = Workers()


def parse_workers(text: str) -> Workers:
    """Return what a text says: "4", "ray", or "ray:ADDRESS", such as "ray:auto" or "ray:ray://head:10001".

    Raises:  OptionError: it says something else.
    """
    word, _, address = text.partition(":")
    if word == RAY:
        return Workers(ray=address)
    if not (text.isdecimal() and int(text) > 0):
        raise OptionError("workers", "a number of processes, ray or ray:ADDRESS", text)
    return Workers(int(text))


@contextmanager
def open_workers(workers: Workers, device: str) -> Iterator[tuple[Executor, int]]:
    """Yield an executor and how many runs it can make at once.

    Args:    device: "cpu" or "cuda"; on a cluster a run gets a GPU of its own.
    Raises:  OptionError: Ray is not installed, not reached, or has no room for a run.
    """
    if workers == HERE:
        use_one_thread()
        yield _Here(), 1
    elif workers.ray is None:
        with _processes(workers.n) as executor:
            yield executor, workers.n
    else:
        with _cluster(workers.ray, device) as (executor, n_at_once):
            yield executor, n_at_once


def use_one_thread() -> None:
    """Keep torch to one thread, so that runs do not compete and sums have one order."""
    torch.set_num_threads(1)


class _Here(Executor):
    """Run in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _processes(n: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(n, mp_context=context, initializer=_start_worker)
    try:
        yield executor
    except BaseException:
        # Whoever ends the bench does not wait for the runs that are under way.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Begin as a worker: with one thread, and for no longer than the bench is there."""
    use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed one tells nobody
        os.kill(os.getpid(), signal.SIGKILL)


class _OnRay(Executor):
    """Run on a cluster; a run whose worker or machine is lost is made again, up to three times."""

    def __init__(self, ray: Any, device: str) -> None:
        self._run = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=3)(_with_one_thread)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._run.remote(fn, args, kwargs).future()
        return future


def _with_one_thread(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    use_one_thread()
    return fn(*args, **kwargs)


@contextmanager
def _cluster(address: str, device: str) -> Iterator[tuple[Executor, int]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        advice = "install qpa with its extra ray, or pass a number of processes"
        raise OptionError("workers", "the package ray", "none", advice) from error
    try:
        ray.init(address or None, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # a cluster that is not there fails in many ways
        raise OptionError(
            "workers", f"a Ray cluster at {address or 'RAY_ADDRESS'}", one_sentence(error)
        ) from error
    try:
        unit = "GPU" if device == "cuda" else "CPU"
        n_at_once = int(ray.cluster_resources().get(unit, 0))
        if n_at_once < 1:
            raise OptionError("workers", f"a cluster with a {unit}", "none")
        yield _OnRay(ray, device), n_at_once
    finally:
        ray.shutdown()
