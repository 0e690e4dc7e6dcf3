"""What every method of a bench is given: a base model, three splits of text, and a training budget.

Rules:
1. Without a test text the end of the data, a tenth of its tokens, is the test split.
2. Tokens are cut into blocks of `length`; a last, shorter block is dropped, so nothing is padded.
3. The last tenth of the data's other blocks is for validation, the rest is for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpa.adapters.module_kind import ALL_LINEAR
from qpa.bench.method import BenchBase
from qpa.documents import AdapterSpec
from qpa.errors import DataError, OptionError
from qpa.generators.size_search import REFERENCE_RANK
from qpa.models.base_model import load_model, load_tokenizer
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.atomic_files import sha256_of
from qpa.store.run_directory import DirectoryStore
from qpa.training.text_data import EVAL_SHARE, read_splits

_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Setting:
    """What the user chose for all runs of a bench.

    Args:    model: local directory or Hub id.
             data, eval_data: text files; eval_data None cuts the test text off `data`.
             targets: "all-linear", module names, or both.
             length: tokens per block.
             test_share: share of the test blocks that is scored, from their start.
             device: "cpu" or "cuda".
    """

    model: str
    data: Path
    eval_data: Path | None = None
    targets: tuple[str, ...] = (ALL_LINEAR,)
    steps: int = 200
    batch_size: int = 8
    length: int = 128
    bf16: bool = False
    test_share: float = 1.0
    device: str = "cpu"

    def check(self) -> None:
        """Check the ranges of the options.

        Raises:  OptionError: one is out of range.
        """
        for option, value in (("--steps", self.steps), ("--batch-size", self.batch_size)):
            if value < 1:
                raise OptionError(option, "a whole number of at least 1", str(value))
        if self.length < 2:
            raise OptionError("--length", "at least 2 tokens", str(self.length))
        if not 0 < self.test_share <= 1:
            raise OptionError("--test-share", "a share above 0 and at most 1", str(self.test_share))


@dataclass(frozen=True)
class Task:
    """A setting, loaded.

    Args:    validation, test: int64[n_rows, length], token ids.
             facts: everything of the setting that determines a run's result, for its line in the book.
             n_reference: trained parameters of LoRA r=4 on the same modules.
    """

    setting: Setting
    base: BenchBase
    validation: Tensor
    test: Tensor
    facts: dict[str, object]
    n_reference: int


@cache
def load_task(setting: Setting) -> Task:
    """Read the texts and describe the base model; once per process.

    Raises:  OptionError, ModelError, DataError: the setting cannot be run.
    """
    setting.check()
    inspect = _inspector(setting)
    reference = inspect(REFERENCE_RANK)
    tokenizer = load_tokenizer(reference.base)
    train, validation, test = _split(setting, tokenizer)
    base = BenchBase(
        load=_loader(setting, reference),
        inspect=inspect,
        target_modules=tuple(a.module for a, _ in reference.pairs),
        train_rows=train,
        bf16=setting.bf16,
    )
    facts = _facts(setting, reference, (train, validation, test))
    return Task(setting, base, validation, test, facts, reference.n_numbers)


def _inspector(setting: Setting) -> Callable[..., AdapterSpec]:
    @cache
    def inspect(rank: int | None, method: str = "lora") -> AdapterSpec:
        targets = setting.targets if method in ("lora", "dora") else None
        inspection = InspectModel(setting.model, rank=rank, targets=targets, method=method)
        context = Pipeline(inspection).run(None, PassContext(0, DirectoryStore(Path())))
        return context.document(AdapterSpec)

    return inspect


def _loader(setting: Setting, spec: AdapterSpec) -> Callable[[], Any]:
    def load() -> Any:
        model = load_model(spec.base, keep_dtype=setting.bf16)
        return model.requires_grad_(False).to(setting.device)

    return load


def _split(setting: Setting, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (training, validation, test) blocks, int64[n_rows, length]."""
    data, test = (
        [row["input_ids"] for row in rows if len(row.get("input_ids", ())) == setting.length]
        for rows in read_splits(setting.data, setting.eval_data, tokenizer, setting.length, seed=0)
    )
    n_validation = max(1, round(EVAL_SHARE * len(data)))
    if len(data) <= n_validation or not test:
        raise DataError(
            str(setting.data),
            f"plain text, with a block of {setting.length} tokens for each of training, validation and test",
            f"{len(data)} blocks and {len(test)} for the test",
            "lower --length or take more text",
        )
    n_test = max(1, round(setting.test_share * len(test)))
    return (
        torch.tensor(data[:-n_validation]),
        torch.tensor(data[-n_validation:]),
        torch.tensor(test[:n_test]),
    )


def _facts(setting: Setting, spec: AdapterSpec, splits: tuple[Tensor, ...]) -> dict[str, object]:
    return {
        "config": spec.base.config_digest,
        "weights": _weights_digest(Path(setting.model)),
        "modules": _digest("\n".join(tensor.module for tensor in spec.tensors).encode()),
        "rows": [_digest(rows.numpy().tobytes()) for rows in splits],
        "steps": setting.steps,
        "batch_size": setting.batch_size,
        "length": setting.length,
        "bf16": setting.bf16,
        "test_share": setting.test_share,
        "device": setting.device,
    }


def _weights_digest(model: Path) -> str:
    """Return one digest of a local model's weight files; empty for a model on the Hub."""
    files = sorted(file for file in model.glob("*") if file.suffix in _WEIGHTS)
    return _digest(" ".join(sha256_of(file) for file in files).encode()) if files else ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
