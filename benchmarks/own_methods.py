"""Run `qpa bench` with methods that only a benchmark needs, on the command line's own terms.

The results directory is one of `qpa bench`: it is continued where it has results, and
`qpa bench --report --out DIR` draws its table and plot again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from qpa.bench.comparison import compare
from qpa.bench.method import Method
from qpa.bench.methods import METHODS
from qpa.bench.report import write_report
from qpa.bench.setting import Extent, Setting


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that such a benchmark has in common with `qpa bench`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="Directory of a causal language model.")
    parser.add_argument("--data", type=Path, required=True, help="UTF-8 text to train on.")
    parser.add_argument("--eval-data", type=Path, help="Text to test on.")
    parser.add_argument("--test-share", type=float, default=1.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--budgets", default="12,130,265", help="Numbers, separated by commas.")
    parser.add_argument("--methods", default="", help="Names, separated by commas; all where there are none.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="Directory of results.")
    return parser


def setting_of(options: argparse.Namespace) -> Setting:
    """Return the setting that the common options ask for; one thread, and nothing printed by others."""
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    torch.set_num_threads(1)
    return Setting(
        model=options.model,
        data=options.data,
        eval_data=options.eval_data,
        test_share=options.test_share,
        bf16=options.bf16,
        max_steps=options.max_steps,
    )


def run(methods: Mapping[str, Method], options: argparse.Namespace) -> None:
    """Make the runs that are missing in the results directory, and draw its report."""
    setting = setting_of(options)
    METHODS.update(methods)
    names = tuple(options.methods.split(",")) if options.methods else tuple(methods)
    budgets = tuple(options.budgets.split(","))
    compare(setting, Extent(budgets=budgets, methods=names, seeds=options.seeds), options.out)
    print(write_report([options.out], options.out))
