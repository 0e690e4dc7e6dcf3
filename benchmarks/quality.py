"""Loss on held-out text: base, LoRA r=1, LoRA r=4, and QPA at two budgets.

Every arm has the same base, data order, steps, batch and schedule, and differs in the adapter's rank and
the optimizer only. The training text is cut in two: nine tenths train, the last tenth chooses the
learning rate with seed 0: two values, and further ones until the best is not the largest or smallest.
The chosen rate is then run with three seeds and scored on the test text, which no choice has seen.
Losses are nats per real token.

    python -m benchmarks.quality --pair bard --model <stories260K> --data <input.txt> --out results.jsonl
    python -m benchmarks.quality --pair wiki --model <pycode-6m> --data <valid.txt> --test <test.txt> \\
        --bf16 --out results.jsonl
    python -m benchmarks.quality --report results.jsonl

Results are appended as one line a run; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 200
BATCH_SIZE = 8
MAX_LENGTH = 256
SEEDS = (0, 1, 2)
MAX_RATES = 6


@dataclass(frozen=True)
class Arm:
    """One method at one size; `heads` 0 is plain LoRA trained by AdamW."""

    name: str
    rank: int
    heads: int
    rates: tuple[float, ...]
    angle_ratio: float = 1.0


ARMS = (
    Arm("LoRA r=1", 1, 0, (1e-2, 3e-2)),
    Arm("LoRA r=4", 4, 0, (1e-2, 3e-2)),
    Arm("QPA 4 heads", 8, 4, (1e-2, 3e-2)),
    Arm("QPA 16 heads", 8, 16, (1e-2, 3e-2)),
)


def train_arm(
    arm: Arm, model: str, texts: dict[str, str], rate: float, seed: int, *, bf16: bool, steps: int
) -> Any:
    """Train one arm once and return its line of results.

    Args:    texts: "train" and "score", whole texts.
             rate: peak learning rate.
    """
    import torch

    from qpa.adapter import adapter_parameters, attach_adapter
    from qpa.base_model import load_model, load_tokenizer
    from qpa.documents import AdapterSpec, WeightLayout
    from qpa.evaluation import evaluate
    from qpa.generator import Generator
    from qpa.optimizer import GeneratedAdapterOptimizer
    from qpa.passes.inspect_model import InspectModel
    from qpa.passes.plan_layout import PlanLayout
    from qpa.pipeline import PassContext, Pipeline
    from qpa.run_directory import DirectoryStore
    from qpa.sft import make_trainer

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        context = PassContext(seed, DirectoryStore(Path(folder)))
        context = Pipeline(InspectModel(model, rank=arm.rank), PlanLayout(heads=arm.heads or None)).run(
            None, context
        )
        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        tokenizer = load_tokenizer(spec.base)
        rows = {name: _blocks(tokenizer, text) for name, text in texts.items()}
        peft_model = attach_adapter(load_model(spec.base, keep_dtype=bf16), spec)
        parameters = adapter_parameters(peft_model, spec)
        optimizer: torch.optim.Optimizer
        if arm.heads:
            adapter = [parameters[tensor.path] for tensor in layout.tensors]
            generator = Generator(layout, seed)
            n_trained = generator.n_parameters
            optimizer = GeneratedAdapterOptimizer(
                adapter, generator, lr=rate, angle_lr=rate * arm.angle_ratio
            )
        else:
            n_trained = sum(parameter.numel() for parameter in parameters.values())
            optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        trainer = make_trainer(
            peft_model,
            optimizer,
            tokenizer,
            (rows["train"], rows["score"]),
            output=Path(folder),
            seed=context.seed_for("data order"),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            learning_rate=rate,
            warmup_steps=0.05,
            bf16=bf16,
            logging_steps=10**6,
        )
        trainer.train()
        score = evaluate(
            peft_model,
            trainer.eval_dataset,
            trainer.data_collator,
            batch_size=BATCH_SIZE,
            bf16=bf16,
            progress=lambda *_: None,
            description="",
        )
    return {
        "trained": n_trained,
        "loss": score.loss,
        "tokens": score.n_tokens,
        "seconds": time.monotonic() - started,
    }


def base_loss(model: str, text: str, *, bf16: bool) -> Any:
    """Return the base model's loss on a text."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from qpa.base_model import config_file_digest, load_model, load_tokenizer
    from qpa.documents import BaseModelReference
    from qpa.evaluation import evaluate

    base = BaseModelReference(
        name_or_path=model,
        revision=None,
        config_digest=config_file_digest(model),
        model_type="",
        architecture="",
        ties_lm_head=False,
        trust_remote_code=False,
    )
    rows = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"]}
        for row in _blocks(load_tokenizer(base), text)
    ]
    score = evaluate(
        load_model(base, keep_dtype=bf16),
        rows,
        DataCollatorForLanguageModeling(pad_token_id=0),
        batch_size=BATCH_SIZE,
        bf16=bf16,
        progress=lambda *_: None,
        description="",
    )
    return {"trained": 0, "loss": score.loss, "tokens": score.n_tokens, "seconds": 0.0}


def _blocks(tokenizer: Any, text: str) -> list[dict[str, Any]]:
    from qpa.text_data import cut_blocks

    return cut_blocks(tokenizer(text, verbose=False)["input_ids"], MAX_LENGTH)


def run_pair(arguments: argparse.Namespace) -> None:
    """Run every arm's search and seeds, appending what is not there yet."""
    text = arguments.data.read_text()
    if arguments.test:
        test = arguments.test.read_text()
    else:
        text, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    test = test[: int(arguments.test_share * len(test))]
    train, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    book = _Book(arguments.out)
    key = {"pair": arguments.pair, "steps": arguments.steps}
    book.once(
        {**key, "arm": "base", "split": "test"}, lambda: base_loss(arguments.model, test, bf16=arguments.bf16)
    )
    for arm in (arm for arm in ARMS if arm.name in arguments.arms):
        best = _search(arm, arguments, book, key, (train, validation))
        for seed in SEEDS:
            book.once(
                {**key, "arm": arm.name, "split": "test", "rate": best, "seed": seed},
                lambda arm=arm, best=best, seed=seed: _train(arm, arguments, train, test, best, seed),
            )


def _search(
    arm: Arm, arguments: argparse.Namespace, book: _Book, key: dict[str, Any], texts: tuple[str, str]
) -> float:
    """Return the best rate; a best one at the edge makes the search go on beyond it."""
    rates, losses = sorted(arm.rates), {}
    factor = rates[1] / rates[0]
    while True:
        for rate in rates:
            line = book.once(
                {**key, "arm": arm.name, "split": "validation", "rate": rate, "seed": 0},
                lambda rate=rate: _train(arm, arguments, *texts, rate, 0),
            )
            losses[rate] = line["loss"] if math.isfinite(line["loss"]) else math.inf
        best = min(losses, key=lambda rate: losses[rate])
        if min(rates) < best < max(rates) or len(rates) == MAX_RATES:
            return best
        rates = sorted([*rates, _rounded(best * factor if best == max(rates) else best / factor)])


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def _train(arm: Arm, arguments: argparse.Namespace, train: str, score: str, rate: float, seed: int) -> Any:
    from qpa.errors import DivergedError

    texts = {"train": train, "score": score}
    try:
        return train_arm(arm, arguments.model, texts, rate, seed, bf16=arguments.bf16, steps=arguments.steps)
    except DivergedError:
        return {"trained": 0, "loss": math.nan, "tokens": 0, "seconds": 0.0}


class _Book:
    """Lines of results in a jsonl file, each run once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def once(self, key: dict[str, Any], work: Any) -> Any:
        for line in self.lines:
            if all(line.get(name) == value for name, value in key.items()):
                return line
        line = {**key, **work()}
        print(line, file=sys.stderr, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def report(path: Path) -> str:
    """Return the test results as a markdown table."""
    lines = [line for line in _Book(path).lines if line["split"] == "test"]
    rows = [
        "| pair | method | trained | lr | loss (nats), mean ± spread | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for pair, arm in dict.fromkeys((line["pair"], line["arm"]) for line in lines):
        runs = [line for line in lines if (line["pair"], line["arm"]) == (pair, arm)]
        losses = [line["loss"] for line in runs]
        mean = statistics.fmean(losses)
        spread = f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(losses) > 1 else ""
        rate = f"{runs[0]['rate']:g}" if "rate" in runs[0] else ""
        trained = f"{runs[0]['trained']:,}"
        rows.append(f"| {pair} | {arm} | {trained} | {rate} | {mean:.4f}{spread} | {math.exp(mean):.1f} |")
    return "\n".join(rows)


def main() -> None:
    """Run a pair, or print the report."""
    import logging
    import os
    import warnings

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair")
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, help="To run some of them only.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--test-share", type=float, default=1.0, help="Score on the first part of the test text."
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report:
        print(report(arguments.report))
        return
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    run_pair(arguments)


if __name__ == "__main__":
    main()
