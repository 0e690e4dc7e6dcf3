"""Bytes of an adapter and of a federated round: compact files against LoRA r=1, VeRA, UniLoRA and TinyLoRA.

A compact file is counted for the size that `qpa plan` finds for a budget, and of the others what PEFT's
`save_pretrained` writes. Nothing is trained, since sizes do not depend on the numbers; those are random.

In a round a client gets the shared adapter and sends its own back: twice the bytes of the numbers' file, of
which adapter_config.json and a layout are no part, since they never change.

    python -m benchmarks.adapter_bytes <directory of a model>
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.paired import markdown
from qpa.bench.method import BenchBase
from qpa.bench.methods import METHODS
from qpa.documents import AdapterSpec
from qpa.generators.canonical import layout_text, serve_layout
from qpa.models.base_model import load_model
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.serve.compact import Compact, Numbers
from qpa.serve.decoding import lengths
from qpa.store.run_directory import DirectoryStore

BUDGETS = (13, 60, 250, 4756)
PEERS = ("lora", "vera", "unilora", "tinylora", "tinylora:tied")
KINDS: tuple[Numbers, ...] = ("float32", "int16")
N_TENANTS = 10_000
HEADER = ("adapter", "trained numbers", "bytes", "bytes beside it", "a round", f"{N_TENANTS:,} tenants, MB")


class Row(NamedTuple):
    """One adapter.

    Args:    n_bytes: of the file with the numbers.
             n_beside: of what lies beside it for each adapter.
             n_shared: of what all adapters share.
    """

    name: str
    n_numbers: int
    n_bytes: int
    n_beside: int = 0
    n_shared: int = 0

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        tenants = N_TENANTS * (self.n_bytes + self.n_beside) + self.n_shared
        counts = (self.n_numbers, self.n_bytes, self.n_beside, 2 * self.n_bytes)
        return (self.name, *(f"{n:,}" for n in counts), f"{tenants / 1e6:,.1f}")


def main() -> int:
    """Print the table for a model."""
    base = bench_base(sys.argv[1])
    rows = [*compact_rows(base.inspect(None)), *(row for name in PEERS for row in peer_rows(name, base))]
    print(markdown(HEADER, [row.cells() for row in rows]))
    return 0


def bench_base(model: str) -> BenchBase:
    """Return a base model as the methods of `qpa bench` see it."""

    @cache
    def inspect(rank: int | None) -> AdapterSpec:
        context = Pipeline(InspectModel(model, rank=rank)).run(None, PassContext(0, DirectoryStore(Path())))
        return context.document(AdapterSpec)

    def load() -> Any:
        return load_model(inspect(1).base, keep_dtype=False).requires_grad_(False)

    targets = tuple(a.module for a, _ in inspect(1).pairs)
    return BenchBase(load, inspect, targets, torch.zeros(0, 0, dtype=torch.int64), bf16=False)


def compact_rows(spec: AdapterSpec) -> Iterator[Row]:
    """Yield compact files near the budgets; a layout is shared, and so is the basis, which is not counted."""
    context = PassContext(0, DirectoryStore(Path()))
    for budget in BUDGETS:
        planned = PlanLayout(max_params=str(budget)).run(spec, context)
        layout = serve_layout(planned)
        rng = np.random.default_rng(0)
        arrays = tuple(
            rng.standard_normal(n).astype(np.float32) for n in lengths(layout, are_probabilities=False)
        )
        compact = Compact(bytes(32), layout.digest, False, arrays)
        for numbers in KINDS:
            content = compact.as_bytes(numbers)
            n_shared = len(layout_text(planned))
            yield Row(f"compact, {numbers}", sum(map(len, arrays)), len(content), n_shared=n_shared)


def peer_rows(name: str, base: BenchBase) -> Iterator[Row]:
    """Yield what PEFT writes for a method at its smallest size, and nearest to the largest budget."""
    method = METHODS[name]
    sizes = method.sizes(base, BUDGETS)
    chosen = {min(sizes, key=lambda size: abs(size.n_trained - budget)): None for budget in BUDGETS}
    for size in chosen:
        attached = method.attach(base, size, rate=method.rates[0], seed=0)
        with tempfile.TemporaryDirectory() as work:
            attached.save(Path(work))
            n_bytes = (Path(work) / "adapter_model.safetensors").stat().st_size
            n_beside = (Path(work) / "adapter_config.json").stat().st_size
        yield Row(f"{name}, {size.label}", size.n_trained, n_bytes, n_beside)


if __name__ == "__main__":
    raise SystemExit(main())
