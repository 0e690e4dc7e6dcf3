"""What a user chooses for a bench: the setting that all its runs share, and how much is compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qpa.adapters.targets import ALL_LINEAR, HELP
from qpa.models.base_model import DEVICES
from qpa.pipeline.options import option


@dataclass(frozen=True)
class Setting:
    """What all runs of a bench share.

    Args:    model: local directory or Hub id.
             data, eval_data: text files; eval_data None cuts the test text off `data`.
             targets: words such as "all-linear", module names, or both.
             max_steps: optimizer steps of a run.
             batch_size, max_length: blocks per step, tokens per block.
             bf16: bfloat16 autocast, base weights in the checkpoint's own dtype.
             test_share: share of the test blocks that is scored, from their start.
             device: "auto", "cpu" or "cuda".
    """

    section: ClassVar[str] = "bench"

    model: str = option(help="Base model: a local directory or a Hub id.")
    data: Path = option(help="UTF-8 text to train on.")
    eval_data: Path | None = option(
        None, help="Text to test on.", shown_default="a tenth of `data`, held out", old_names=("eval",)
    )
    targets: tuple[str, ...] = option(
        (ALL_LINEAR,),
        help=HELP,
        old_names=("target_modules",),
    )
    max_steps: int = option(200, help="Optimizer steps of a run.", at_least=1, old_names=("steps",))
    batch_size: int = option(8, help="Blocks per step.", at_least=1)
    max_length: int = option(128, help="Tokens per block.", at_least=2, unit="tokens", old_names=("length",))
    bf16: bool = option(False, help="bfloat16 autocast; what is trained stays float32.")
    test_share: float = option(1.0, help="Share of the test text that is scored.", above=0, at_most=1)
    device: str = option("auto", help="Device to run on: {choices}.", choices=DEVICES)


@dataclass(frozen=True)
class Extent:
    """What a bench compares, and with how many runs.

    Args:    budgets: trained parameters, as numbers such as "1850" or as shares of LoRA r=4's such as "25%".
             methods: names of `qpa.bench.methods`.
             ablate: compare qpa, its controls and its variants, and not `methods`.
             seeds: runs that each mean is over.
             workers: what makes the runs, see `qpa.bench.workers.parse_workers`.
             minutes: no run starts after this time; None is no limit.
    """

    section: ClassVar[str] = "bench"

    budgets: tuple[str, ...] = option(
        ("4%", "8%", "17%", "25%", "52%"),
        help="Trained parameters: shares of LoRA r=4's, or numbers, separated by commas.",
    )
    methods: tuple[str, ...] = option(
        ("qpa", "lora", "vera", "unilora"), help="Methods, separated by commas."
    )
    ablate: bool = option(False, help="qpa with its parts left out or replaced, instead of `methods`.")
    seeds: int = option(3, help="Runs that each mean is over.", at_least=1)
    workers: str = option(
        "1",
        help="Processes of one thread each, as a number; or ray, or ray:ADDRESS, for those of a cluster.",
        old_names=("jobs",),
    )
    minutes: float | None = option(
        None, help="Start no run after this time; the same command goes on.", at_least=0
    )
