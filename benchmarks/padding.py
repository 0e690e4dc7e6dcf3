"""Where a perplexity of 1.6 comes from: the paper's setting in shape, scored with and without its padding.

The paper (arXiv 2410.09846) adapts the output head alone, LoRA r=4, with one circuit and one affine mapping
model; its public script pads every line to 512 tokens and counts the padding in training and in the
perplexity. Here the same generator trains twice on lines padded to --length, once with the padding counted
and once with it masked, and each adapter and the base model are scored both ways. Losses are nats per token.

    python -m benchmarks.padding --bf16 --model <pycode-6m> --data <valid.txt> --test <test.txt>
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model, load_tokenizer
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.run_directory import DirectoryStore
from qpa.training.data.token_rows import IGNORED
from qpa.training.evaluation import causal_loss, count_tokens
from qpa.training.generated_adapter import attach_generator
from qpa.training.plain_step import take_step

RANK = 4
BATCH_SIZE = 8
Rows = tuple[Tensor, Tensor]


def padded_lines(tokenizer: Any, text: str, length: int, n_rows: int) -> Rows:
    """Return (input_ids, labels), int64[n, length]: lines that are not blank, padded by the end token.

    The first end token after a line is real in both scores; the labels of those after it are -100.
    """
    lines = [line for line in text.splitlines() if line.strip()][:n_rows]
    end = tokenizer.eos_token_id
    ids = torch.full((len(lines), length), end)
    labels = torch.full((len(lines), length), IGNORED)
    for row, line in enumerate(lines):
        tokens = [*tokenizer(line, verbose=False)["input_ids"], end][:length]
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens)
    return ids, labels


@torch.no_grad()
def score(model: Any, rows: Rows, *, bf16: bool, counts_padding: bool) -> float:
    """Return nats per token over all rows, of real tokens or of all."""
    ids, labels = rows
    labels = ids if counts_padding else labels
    total, n_tokens = 0.0, 0
    for start in range(0, len(ids), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        n = count_tokens(labels[batch])
        total += n * float(causal_loss(model, ids[batch], labels[batch], bf16=bf16))
        n_tokens += n
    return total / n_tokens


def train(
    options: argparse.Namespace, spec: AdapterSpec, layout: WeightLayout, rows: Rows, counts: bool
) -> Any:
    """Return the adapted model after the given number of steps."""
    base, generator = load_model(spec.base, keep_dtype=options.bf16), make_generator(layout, seed=0)
    adapted = attach_generator(base, spec, generator, lr=options.lr, angle_lr=options.lr)
    ids, labels = rows
    random = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        chosen = torch.randint(len(ids), (BATCH_SIZE,), generator=random)
        adapted.optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
        targets = (ids if counts else labels)[chosen]
        take_step(adapted.optimizer, causal_loss(adapted.model, ids[chosen], targets, bf16=options.bf16))
    return adapted.model


def main() -> None:
    """Print the table of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--test-lines", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context = Pipeline(
        InspectModel(options.model, rank=RANK, targets=("lm_head",)), PlanLayout(generator="paper")
    ).run(None, PassContext(0, DirectoryStore(Path())))
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    tokenizer = load_tokenizer(spec.base)
    rows = padded_lines(tokenizer, options.data.read_text(encoding="utf-8-sig"), options.length, 10**9)
    test = padded_lines(
        tokenizer, options.test.read_text(encoding="utf-8-sig"), options.length, options.test_lines
    )
    share = 1 - float((test[1] != IGNORED).float().mean())
    print(f"{layout.account.n_generator:,} trained for {layout.account.n_adapter:,}; {share:.0%} padding\n")
    print("| model | loss, padding masked | perplexity | loss, padding counted | perplexity |")
    print("|---|---|---|---|---|")
    base = load_model(spec.base, keep_dtype=options.bf16)
    _report("base", base, test, options)
    for counts, name in ((False, "trained on real tokens"), (True, "trained on padding too")):
        _report(name, train(options, spec, layout, rows, counts), test, options)


def _report(name: str, model: Any, test: Rows, options: argparse.Namespace) -> None:
    losses = [score(model.eval(), test, bf16=options.bf16, counts_padding=counts) for counts in (False, True)]
    cells = [cell for loss in losses for cell in (f"{loss:.4f}", f"{math.exp(loss):.2f}")]
    print("| " + " | ".join((name, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
