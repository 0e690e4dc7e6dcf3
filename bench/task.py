"""What every method of a bench is given: a base model, three splits of text, and a training budget.

Rules:
1. Without a test text the end of the data, a tenth of its tokens, is the test split.
2. Tokens are cut into blocks of `max_length`; a last, shorter block is dropped, so nothing is padded.
3. The last tenth of the data's other blocks is for validation, the rest is for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpa.adapters.registry import DEFAULT, KINDS
from qpa.bench.method import BenchBase
from qpa.bench.setting import Setting
from qpa.documents import AdapterSpec
from qpa.errors import DataError
from qpa.generators.size_search import REFERENCE_RANK
from qpa.models.base_model import load_model, load_tokenizer, torch_device
from qpa.models.causality import check_causal
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.options import check_options
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.atomic_files import sha256_of
from qpa.store.run_directory import DirectoryStore
from qpa.training.data.data_options import EVAL_SHARE, DataOptions
from qpa.training.data.splits import STREAM, instruction_splits

_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Task:
    """A setting whose texts and base model have been read.

    Args:    validation, test: int64[n_rows, max_length], token ids.
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
    check_options(setting)
    setting = replace(setting, device=torch_device(setting.device))
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
    def inspect(rank: int | None, method: str = DEFAULT, **options: Any) -> AdapterSpec:
        targets = setting.targets if KINDS[method].rules.is_product else None
        inspection = InspectModel(setting.model, rank=rank, targets=targets, method=method, **options)
        context = Pipeline(inspection).run(None, PassContext(0, DirectoryStore(Path())))
        return context.document(AdapterSpec)

    return inspect


def _loader(setting: Setting, spec: AdapterSpec) -> Callable[[], Any]:
    def load() -> Any:
        model = load_model(spec.base, keep_dtype=setting.bf16).to(setting.device)
        check_causal(model, spec.base.name_or_path, bf16=setting.bf16)
        return model.requires_grad_(False)

    return load


def _split(setting: Setting, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (training, validation, test) blocks, int64[n_rows, max_length]."""
    eval_data = None if setting.eval_data is None else (str(setting.eval_data),)
    options = DataOptions((str(setting.data),), eval_data, max_length=setting.max_length)
    splits = instruction_splits(options, tokenizer, seed=0)
    is_text = splits.summary is not None and splits.summary.shape == STREAM
    data, test = (
        [row["input_ids"] for row in rows if is_text and len(row["input_ids"]) == setting.max_length]
        for rows in (splits.training, splits.evaluation)
    )
    n_validation = max(1, round(EVAL_SHARE * len(data)))
    if len(data) <= n_validation or not test:
        raise DataError(
            str(setting.data),
            f"plain text, with a block of {setting.max_length} tokens for training, validation and test each",
            f"{len(data)} blocks and {len(test)} for the test",
            "lower `max_length` or take more text",
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
        "steps": setting.max_steps,
        "batch_size": setting.batch_size,
        "length": setting.max_length,
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
