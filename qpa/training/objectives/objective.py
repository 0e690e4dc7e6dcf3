"""What an objective is: what a generator is trained for, from the rows it learns from to how it is scored.

    files --rows--> splits --trainer-----------> a trainer of transformers, with the generator's optimizer
                       |-----calibration_loss--> the gradient whose directions spectra take
                       `-----scores------------> what is compared before and after training

To add an objective, write a file of its own and add a line to `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from qpa.registry import Registry
from qpa.training.data.splits import Splits
from qpa.training.data.token_rows import Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Trainer, TrainingArguments

    from qpa.progress import Progress
    from qpa.training.evaluation import RowLosses
    from qpa.training.training_options import TrainingOptions

    A = TypeVar("A", bound=TrainingArguments)

LOSS = "loss"
"""The score that every objective gives: lower is better, and it is finite as long as training goes well."""


PERPLEXITY = "perplexity"
"""A score that says the same as the loss, where that is in nats per token: its exponential."""


class Objective(Protocol):
    """One thing to train for.

    Class attributes: `name` is how a user asks for it.
    Args:    options: of the training.
             tokenizer: of the base model.
    """

    name: ClassVar[str]

    def __init__(self, options: TrainingOptions, tokenizer: Any) -> None: ...

    def rows(self, seed: int) -> Splits:
        """Read the data, and split it into rows to train on and rows to score.

        Args:    seed: draws the rows that are held out, where no file of them is given.
        Raises:  DataError: a file is missing or damaged, or a split has nothing to learn from.
                 OptionError: an option does not fit the data.
        """
        ...

    def with_reference(self, model: Any, splits: Splits, progress: Progress) -> Splits:
        """Return the splits with what the objective has to know of the model before its first step.

        Args:    model: as `trainer` gets it, its adapter as it starts.
        """
        ...

    def trainer(
        self, model: Any, optimizer: torch.optim.Optimizer, splits: Splits, **arguments: Any
    ) -> Trainer:
        """Return a trainer that is ready, and that logs and saves nothing by itself.

        Args:    model: an adapted model, as `qpa.adapters.attach.attach_adapter` returns it, on its device.
                 arguments: for `make_arguments`.
        """
        ...

    def calibration_loss(self, model: Any, rows: Sequence[Row]) -> Tensor:
        """Return the mean loss of a batch of rows, from which autograd reaches the adapter."""
        ...

    def scores(
        self, model: Any, rows: Sequence[Row], progress: Progress, description: str
    ) -> dict[str, float]:
        """Return scores of a model on a split by their names, `LOSS` among them.

        Args:    progress: called with the description, and with how many rows are done.
        """
        ...

    def row_losses(self, model: Any, rows: Sequence[Row]) -> RowLosses:
        """Return the losses of a model on the single rows of a split; that of all is the score `LOSS`."""
        ...


def as_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores under their names in metrics.jsonl."""
    return {f"eval_{name}": value for name, value in scores.items()}


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective", {"sft": "qpa.training.objectives.sft:SFT", "dpo": "qpa.training.objectives.dpo:DPO"}
)


def make_arguments(kind: type[A], model: Any, *, output: Path, seed: int, **options: Any) -> A:
    """Return the arguments of a trainer that leaves logs, checkpoints and progress to qpa.

    Args:    kind: `transformers.TrainingArguments` or a subclass, such as `trl.SFTConfig`.
             model: tells the device.
             output: a directory the trainer may create.
             seed: of the data order.
             options: further fields of `kind`.
    """
    from qpa.compat.transformers_ import use_one_device

    is_on_cpu = next(model.parameters()).device.type == "cpu"
    arguments: A = kind(
        output_dir=str(output),
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        use_cpu=is_on_cpu,
        dataloader_pin_memory=not is_on_cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        # TRL's configs have defaults of their own.
        **{"lr_scheduler_type": "cosine", "activation_checkpointing": False, "bf16": False, **options},
    )
    use_one_device(arguments)
    return arguments
