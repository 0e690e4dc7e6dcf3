"""Several processes that train one adapter: who does what, and what they say to each other.

    accelerate launch -m qpa train ...     or     torchrun -m qpa train ...

starts the same command several times. The first process does all of it: it reads the command line, holds the
run's lock, writes every file and says everything that is said. The others `follow`: they wait until the first
one trains, take part, and wait again, until it is done. So they need neither options nor commands.

Rules of a training:
1. Every process has the whole adapter and a share of each step's rows. The adapter's gradients are averaged
   over all of them, by DistributedDataParallel, or by transformers where FSDP2 shards the base model.
2. The first process alone moves the generator and runs the circuits; it shares the numbers, bit for bit, and
   every process decodes them. At the start, at checkpoints and at the end all compare what they have.
3. Whoever fails first says why, and ends; the others end without a word. The launcher ends those that wait.

What the first process wants is told through the launcher's key-value store, as JSON; numbers travel by gloo
or NCCL, as numbers. Nothing is pickled.

Source:  ours; torch.distributed, accelerate.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from qpa.errors import ProcessError, one_sentence

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(days=7)
"""How long a process waits for another: the first one may queue for a device, or plan for hours."""

_START = timedelta(minutes=10)
"""How long a process waits for the others to be started at all."""

_TASK, _ENDED, _LEFT = "task", "ended", "left"
_POLL_S, _FAREWELL_S = 0.1, 10.0


def n_started() -> int:
    """Return how many processes the launcher has started; 1 where there is no launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_follower() -> bool:
    """Return whether this process is not the first of several."""
    return n_started() > 1 and int(os.environ.get("RANK") or 0) > 0


@dataclass(frozen=True)
class Processes:
    """The processes of a training, as one of them sees them.

    Args:    rank: its number, from 0.
             n: how many there are.
             is_sharded: whether each holds a part of the base model only (FSDP2).
    """

    rank: int = 0
    n: int = 1
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Return whether this process does what is done once."""
        return self.rank == 0

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the first one's numbers, in place; shapes are the same everywhere."""
        import torch

        if self.n > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def share_matrix(self, matrix: Tensor | None, device: torch.device) -> Tensor | None:
        """Return the first process's matrix, float32[n, m], or its None, whatever the others have."""
        import torch

        if self.n == 1:
            return matrix
        shape = torch.tensor([-1, -1] if matrix is None else matrix.shape, device=device)
        self.share([shape])
        n, m = shape.tolist()
        if n < 0:
            return None
        shared = torch.empty(n, m, device=device) if matrix is None else matrix.detach().contiguous()
        self.share([shared])
        return shared

    def share_numbers(self, numbers: Mapping[str, float], device: torch.device) -> Mapping[str, float]:
        """Return the first process's numbers by the same names."""
        import torch

        if self.n == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
        self.share([values])
        return dict(zip(numbers, values.tolist(), strict=True))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether a flag is set in one of the processes."""
        import torch

        if self.n == 1:
            return flag
        flags = torch.tensor([int(flag)], device=device)
        torch.distributed.all_reduce(flags)
        return bool(flags.item())

    def check_same(self, tensors: Sequence[Tensor], when: str) -> None:
        """Check that all processes hold the same bits.

        Args:    tensors: float32, the same shapes everywhere.
                 when: says in the error when they were compared.
        Raises:  ProcessError: some differ.
        """
        import torch

        if self.n == 1:
            return
        mine = torch.stack([_digest(tensor) for tensor in tensors])
        all_ = [torch.empty_like(mine) for _ in range(self.n)]
        torch.distributed.all_gather(all_, mine)
        others = [str(rank) for rank, theirs in enumerate(all_) if not torch.equal(theirs, all_[0])]
        if others:
            found = f"other numbers in process {', '.join(others)} than in process 0"
            advice = "use the same device and the same versions of torch in all of them"
            raise ProcessError(f"the adapter {when}", "the same bits in all processes", found, advice)


ALONE = Processes()


def _digest(tensor: Tensor) -> Tensor:
    """Return int64: a sum of a float32 tensor's bits, of which each place has a weight of its own."""
    import torch

    bits = tensor.detach().contiguous().view(torch.int32).flatten().to(torch.int64)
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return (bits * (2 * places + 1)).sum()


def join(device: str) -> Processes:
    """Return the processes of this training, once all of them are here; `ALONE` where there is no launcher.

    Args:    device: "cpu" or "cuda", where all of them train; each takes the GPU of its own number.
    """
    if n_started() == 1:
        return ALONE
    import torch
    from accelerate import PartialState
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    rank = int(os.environ["RANK"])
    if not torch.distributed.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        store = PrefixStore("training", _store())
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=n_started(), timeout=PATIENCE
        )
    is_sharded = _wants_shards()
    # The base is sharded while it is loaded, and the trainer must not do it again.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    PartialState(cpu=device == "cpu")
    return Processes(rank, n_started(), is_sharded)


@cache
def _wants_shards() -> bool:
    """Return whether accelerate's launcher was asked to shard the model.

    Raises:  ProcessError: by FSDP1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ProcessError("FSDP", "version 2", version, "pass `fsdp_version` 2 to accelerate launch")
    return True


def meet() -> None:
    """Reach the launcher's store, which the first process may have to open; nothing without a launcher.

    Raises:  ProcessError: it is not there.
    """
    if n_started() > 1:
        try:
            _store()
        except RuntimeError as error:
            raise _lost(error) from error


def call_followers(task: dict[str, Any]) -> None:
    """Tell the other processes what to do next; nothing where there are none."""
    if n_started() > 1:
        _store().set(f"{_TASK} {_count_task()}", json.dumps(task))


def tasks() -> Iterator[dict[str, Any]]:
    """Yield what the first process wants done, until it is done itself."""
    while (task := json.loads(_wait_for(f"{_TASK} {_count_task()}"))) is not None:
        yield task


def leave() -> None:
    """End this process's part, and, of the first process, let the others end.

    The first process may hold the store, so it stays until the others have read that they may go.
    """
    if n_started() == 1:
        return
    import torch

    with suppress(RuntimeError):  # the process that held the store is gone
        store, n_others = _store(), n_started() - 1
        if is_follower():
            store.add(_LEFT, 1)
        else:
            store.set(f"{_TASK} {_count_task()}", "null")
            deadline_s = time.monotonic() + _FAREWELL_S
            while store.add(_LEFT, 0) < n_others and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first_to_end() -> bool:
    """Return whether no other process has said before why the program ends."""
    if n_started() == 1:
        return True
    try:
        return int(_store().add(_ENDED, 1)) == 1
    except RuntimeError:  # the process that held the store is gone
        return False


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Say in one line what torch says in many when another process has ended.

    Raises:  ProcessError: a message to the other processes failed.
    """
    try:
        yield
    except RuntimeError as error:
        if n_started() == 1 or not _is_of_connection(error):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> ProcessError:
    advice = "look for its own error, and go on with `resume`"
    return ProcessError("the processes", "all of them until the end", one_sentence(error), advice)


def _is_of_connection(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _wait_for(key: str) -> bytes:
    """Return a value of the store once it is there; signals are heard meanwhile, as in no call of the store.

    Raises:  ProcessError: the process that holds the store has ended.
    """
    store = _store()
    try:
        while not store.check([key]):
            time.sleep(_POLL_S)
        value: bytes = store.get(key)
    except RuntimeError as error:
        raise _lost(error) from error
    return value


_n_tasks = 0


def _count_task() -> int:
    global _n_tasks
    _n_tasks += 1
    return _n_tasks


@cache
def _store() -> Any:
    """Return the launcher's store, where all processes put and find values by their keys."""
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    store, _, _ = next(rendezvous("env://", timeout=_START))
    store.set_timeout(PATIENCE)
    return PrefixStore("qpa", store)
