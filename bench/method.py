"""What a method is to the bench: a name, learning rates, sizes, and a way to attach itself to a model.

Nothing a method declares about its size is believed: the number of trained parameters is counted from
what its optimizer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qpa.documents import AdapterSpec


class Configuration(NamedTuple):
    """One size of a method.

    Args:    label: how the size is made, as the table shows it: "r=1", "circuits 5".
             knobs: what `attach` needs to make it again, as names and plain values.
             n_trained: numbers it is expected to train.
    """

    label: str
    knobs: tuple[tuple[str, int | float | str | bool], ...]
    n_trained: int


@dataclass(frozen=True)
class BenchBase:
    """A base model as the methods see it.

    Args:    load: returns the model anew, frozen, in evaluation mode, in its own dtype.
             inspect: returns the AdapterSpec of LoRA on the target modules, at a rank or the default one;
             or of another method of `InspectModel`, with options of it, on its own target modules.
             target_modules: paths of the adapted linear layers.
             train_rows: int64[n_rows, length], token ids of the training split, for methods that calibrate.
             bf16: the model runs under bfloat16 autocast.
    """

    load: Callable[[], Any]
    inspect: Callable[..., AdapterSpec]
    target_modules: tuple[str, ...]
    train_rows: Tensor
    bf16: bool


@dataclass(frozen=True)
class Attached:
    """A model with an adapter on it, ready to train.

    Args:    model: takes input_ids and use_cache, returns logits; its adapter changes nothing yet,
             except where the method itself starts elsewhere.
             optimizer: holds everything that is trained, and nothing else.
             save: writes the adapter into a directory, as its users would keep it.
             exports_to_lora: whether a plain LoRA of some rank carries the trained adapter without loss.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    save: Callable[[Path], None]
    exports_to_lora: bool


class Method(Protocol):
    """A way to adapt a model at a chosen number of trained parameters.

    Args:    name: as on the command line.
             rates: the learning rates of its search, mostly three, ascending.
    """

    @property
    def name(self) -> str: ...

    @property
    def rates(self) -> tuple[float, ...]: ...

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return configurations to choose from; those near the budgets are enough."""
        ...

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Attach the adapter to a fresh model.

        Args:    rate: peak learning rate; a method with several scales them together.
                 seed: of everything the method draws.
        """
        ...


def trained_numbers(optimizer: torch.optim.Optimizer) -> int:
    """Return how many numbers an optimizer trains; of one that owns an inner optimizer, what that holds."""
    inner = getattr(optimizer, "inner", optimizer)
    tensors = {id(p): p for group in inner.param_groups for p in group["params"]}
    return sum(p.numel() for p in tensors.values() if p.requires_grad)
