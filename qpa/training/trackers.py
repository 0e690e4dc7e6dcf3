"""Trackers: programs of others that draw what a training reports while it runs.

Each is a package of its own, reached through transformers' callback for it, which also reads the environment
variables that its users know, such as WANDB_PROJECT. A tracker gets the lines of metrics.jsonl and nothing
else, under transformers' names: eval_loss arrives as eval/loss, and loss as train/loss. TensorBoard's files
are in the run, below tensorboard/.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpa.errors import OptionError
from qpa.registry import Registry
from qpa.store.run_directory import TENSORBOARD


@dataclass(frozen=True)
class Tracker:
    """A tracker that transformers has a callback for.

    Args:    package: what must be installed for it.
             callback: makes the callback, from the run's directory.
    """

    package: str
    callback: Callable[[Path], Any]


def _tensorboard(run: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(run / TENSORBOARD)))


def _wandb(run: Path) -> Any:
    from transformers.integrations import WandbCallback

    return WandbCallback()


def _trackio(run: Path) -> Any:
    from transformers.integrations import TrackioCallback

    return TrackioCallback()


ON_TENSORBOARD = Tracker("tensorboard", _tensorboard)
ON_WANDB = Tracker("wandb", _wandb)
ON_TRACKIO = Tracker("trackio", _trackio)

TRACKERS: Registry[Tracker] = Registry(
    "report_to",
    {
        "tensorboard": "qpa.training.trackers:ON_TENSORBOARD",
        "wandb": "qpa.training.trackers:ON_WANDB",
        "trackio": "qpa.training.trackers:ON_TRACKIO",
    },
)


def check_trackers(names: Sequence[str]) -> None:
    """Check, before a training, that what its trackers need is installed.

    Raises:  OptionError: there is no tracker of a name, or its package is missing.
    """
    for name in names:
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            advice = f"pip install {package}"
            raise OptionError("report_to", f"the package {package}, for {name}", "none", advice)


class Trackers:
    """The trackers of one training.

    Args:    names: of the trackers.
             run: the run's directory.
             trainer: of transformers, whose arguments and model the trackers describe.
    """

    def __init__(self, names: Sequence[str], run: Path, trainer: Any) -> None:
        self._callbacks = [TRACKERS[name].callback(run) for name in names]
        self._trainer = trainer
        self._tell("on_train_begin", 0)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Pass on one line of metrics.jsonl."""
        self._tell("on_log", step, logs=dict(metrics))

    def close(self) -> None:
        """Let the trackers finish what they write."""
        self._tell("on_train_end", 0, processing_class=None)

    def _tell(self, event: str, step: int, **more: Any) -> None:
        from transformers import TrainerControl, TrainerState

        trainer = self._trainer
        state = TrainerState(global_step=step)
        for callback in self._callbacks:
            getattr(callback, event)(trainer.args, state, TrainerControl(), model=trainer.model, **more)
