"""One run of the bench: a fresh model, a method's adapter, a plain training loop, and what came of it."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpa.bench.method import Attached, Configuration, Method, trained_numbers
from qpa.bench.task import Task
from qpa.errors import DivergedError
from qpa.progress import silent
from qpa.training.evaluation import causal_loss, evaluate
from qpa.training.plain_step import take_step

WARM_UP_SHARE = 0.05
_BYTES_PER_TRAINED = 12  # float32: the number itself and Adam's two moments
_ADAPTER_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Measured:
    """What one run gave.

    Args:    n_trained: numbers trained, counted from the optimizer before the first step.
             validation, test: nats per token; None where the run diverged.
             train_s: seconds of the training loop alone; setup_s: seconds of loading and attaching.
             peak_mb: largest resident memory during training (on a GPU, allocated memory); None where
             the system does not tell.
             state_bytes: trained numbers and Adam's moments.
             file_bytes: the size of the saved adapter's arrays.
    """

    n_trained: int
    validation: float | None
    test: float | None
    diverged: bool
    train_s: float
    setup_s: float
    peak_mb: float | None
    state_bytes: int
    file_bytes: int
    exports_to_lora: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def run_trial(task: Task, method: Method, configuration: Configuration, rate: float, seed: int) -> Measured:
    """Train one method once and measure it.

    Args:    seed: of the data order, the same for every method, and of what the method draws.
    Returns: the measurement; where the run diverges, it has no losses.
    """
    gc.collect()
    torch.manual_seed(seed)
    started = time.monotonic()
    attached = method.attach(task.base, configuration, rate=rate, seed=seed)
    setup_s = time.monotonic() - started
    n_trained = trained_numbers(attached.optimizer)
    _reset_peak(task.setting.device)
    started = time.monotonic()
    diverged = not _trains(task, attached, seed)
    train_s = time.monotonic() - started
    peak_mb = _peak_mb(task.setting.device)
    validation, test = (None, None) if diverged else losses(task, attached.model)
    return Measured(
        n_trained=n_trained,
        validation=validation,
        test=test,
        diverged=validation is None,
        train_s=round(train_s, 3),
        setup_s=round(setup_s, 3),
        peak_mb=peak_mb,
        state_bytes=n_trained * _BYTES_PER_TRAINED,
        file_bytes=_saved_bytes(attached),
        exports_to_lora=attached.exports_to_lora,
    )


def losses(task: Task, model: Any) -> tuple[float | None, float | None]:
    """Return a model's (validation, test) loss in nats per token; (None, None) if either is not finite."""
    found = [
        evaluate(
            model,
            [{"input_ids": row} for row in rows],
            _collate,
            batch_size=task.setting.batch_size,
            autocast_to=torch.bfloat16 if task.setting.bf16 else None,
            progress=silent,
            description="",
        ).loss
        for rows in (task.validation, task.test)
    ]
    return (found[0], found[1]) if all(map(math.isfinite, found)) else (None, None)


def learning_rate_scale(step: int, n_steps: int) -> float:
    """Return the share of the peak rate at a step: linear warm-up over 5 % of the steps, then linear to 0.

    Args:    step: from 0.
    """
    n_warm = max(1, round(WARM_UP_SHARE * n_steps))
    return min((step + 1) / n_warm, (n_steps - step) / max(1, n_steps - n_warm))


def batches(rows: Tensor, batch_size: int, n_steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `n_steps` batches int64[batch_size, length], reshuffling the rows after each pass."""
    generator = torch.Generator().manual_seed(seed)
    n_passes = -(-n_steps * batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(n_passes)])
    for step in range(n_steps):
        yield rows[order[step * batch_size : (step + 1) * batch_size]]


def _trains(task: Task, attached: Attached, seed: int) -> bool:
    """Train; return whether every loss and gradient was finite."""
    setting, optimizer = task.setting, attached.optimizer
    peaks = [group["lr"] for group in optimizer.param_groups]
    attached.model.train()
    for step, rows in enumerate(batches(task.base.train_rows, setting.batch_size, setting.max_steps, seed)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_scale(step, setting.max_steps)
        rows = rows.to(setting.device)
        try:
            take_step(optimizer, causal_loss(attached.model, rows, rows, bf16=setting.bf16))
        except DivergedError:
            return False
    return True


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _saved_bytes(attached: Attached) -> int:
    with tempfile.TemporaryDirectory() as folder:
        attached.save(Path(folder))
        return sum(file.stat().st_size for pattern in _ADAPTER_FILES for file in Path(folder).rglob(pattern))


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mb(device: str) -> float | None:
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if kilobytes is None else round(int(kilobytes) * 1.024e-3, 1)
