"""A store of 10,000 compact adapters, and what expanding one costs, with bases of random directions.

The first table: bytes and disk of the store, and seconds to list and to verify it. The second, for shapes of
base models at rank 32: what it takes to get the tensors of an adapter into memory, from its plain LoRA on
disk (`safetensors.numpy.load_file`) and by expanding it, both with files that the system has in memory; to
expand it into a directory; to get it from the cache, where it is; and to open the basis, once for a server.
Peak memory is that of a process of its own, the imports included.

    python -m benchmarks.store_sizes
    python -m benchmarks.store_sizes --adapters 1000 --models tiny-llama
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeVar

from safetensors.numpy import load_file

from benchmarks.paired import markdown, spread_of_ratios, time_in_turns
from benchmarks.random_compact import LLAMA, layers, write_adapters, write_basis, write_layout
from qpa.serve.basis import Basis
from qpa.serve.cache import Cache
from qpa.serve.expansion import WEIGHTS_FILE, expand, tensors
from qpa.serve.store import Store

T = TypeVar("T")

RANK = 32
N_ROUNDS = 7
BUDGET_S = 60.0


def qwen3(hidden: int, feed_forward: int, n_heads: int, n_layers: int) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a Qwen3 with 8 key-value heads of 128."""
    shapes = {
        **{f"self_attn.{name}_proj": (128 * n, hidden) for name, n in {"q": n_heads, "k": 8, "v": 8}.items()},
        "self_attn.o_proj": (hidden, 128 * n_heads),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    return layers(shapes, n_layers)


MODELS = {
    "tiny-llama": layers(LLAMA, 2),
    "Qwen3-0.6B": qwen3(1024, 3072, 16, 28),
    "Qwen3-8B": qwen3(4096, 12288, 32, 36),
}

READING = "from safetensors.numpy import load_file\nfound = load_file({0!r})"
EXPANDING = """
from pathlib import Path
from qpa.serve.basis import Basis
from qpa.serve.expansion import expand
expand(Path({0!r}), Basis.open(Path({1!r})), Path({2!r}))
"""
IMPORTING = "import qpa.serve.expansion, safetensors.numpy"


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(markdown(("of the store", ""), store_rows(Path(work), options.adapters)))
    header = ("", *options.models.split(","))
    columns = []
    for name in header[1:]:
        with tempfile.TemporaryDirectory() as work:
            columns.append(expansion_facts(Path(work), name))
        print(f"{name} is done", file=sys.stderr)
    print(markdown(header, [(what, *(column[what] for column in columns)) for what in columns[0]]))
    return 0


def store_rows(work: Path, n_adapters: int) -> list[tuple[str, str]]:
    """Return the first table for a store of so many adapters."""
    basis = write_basis(work / "basis", MODELS["tiny-llama"])
    layout = write_layout(work / "store", basis, n_circuits=3)
    names = [f"tenant-{number}" for number in range(n_adapters)]
    write_adapters(work / "store", names, basis, layout)
    store = Store.open(work / "store")
    entries, listing_s = timed(lambda: list(store.entries()))
    findings, verifying_s = timed(lambda: list(store.verify(basis)))
    assert len(entries) == n_adapters and not findings
    disk = sum(512 * path.stat().st_blocks for path in store.directory.iterdir() if path.is_file())
    return [
        ("adapters", f"{n_adapters:,} of {entries[0].n_numbers} numbers"),
        ("bytes", f"{sum(entry.n_bytes for entry in entries):,}"),
        ("disk, bytes in whole blocks", f"{disk:,}"),
        ("listing", f"{listing_s:.2f} s"),
        ("verification", f"{verifying_s:.2f} s"),
    ]


def expansion_facts(work: Path, model: str) -> dict[str, str]:
    """Return the second table's column of a model."""
    basis = write_basis(work / "basis", MODELS[model], rank=RANK)
    layout = write_layout(work / "store", basis)
    (compact,) = write_adapters(work / "store", ["a"], basis, layout)
    expand(compact, basis, work / "plain")
    plain, cache, fresh = work / "plain" / WEIGHTS_FILE, Cache(work / "cache", basis), count()
    n_bytes = plain.stat().st_size
    contenders: dict[str, Callable[[], object]] = {
        "read": lambda: load_file(plain),
        "expand": lambda: dict(tensors(compact, basis)),
    }
    durations = time_in_turns(contenders, n_rounds=N_ROUNDS, budget_s=BUDGET_S)
    ratio = spread_of_ratios(durations["expand"], durations["read"])
    writing = [timed(lambda: expand(compact, basis, work / f"out-{next(fresh)}"))[1] for _ in range(3)]
    cache.get(compact)
    return {
        "LoRA on disk, MB": f"{n_bytes / 1e6:,.1f}",
        "compact file, bytes": f"{compact.stat().st_size:,}",
        "basis, MB": f"{basis.arrays.stat().st_size / 1e6:,.1f}",
        "read the LoRA, ms": milliseconds(durations["read"]),
        "expand into memory, ms": milliseconds(durations["expand"]),
        "expand / read": ratio.text(),
        "expand into a directory, ms": milliseconds(writing),
        "from the cache, ms": milliseconds([timed(lambda: cache.get(compact))[1] for _ in range(5)]),
        "open the basis, ms": milliseconds([timed(lambda: Basis.open(work / "basis"))[1] for _ in range(3)]),
        "peak memory of reading, MB": peak_megabytes(READING.format(str(plain))),
        "peak memory of expanding, MB": peak_megabytes(
            EXPANDING.format(str(compact), str(work / "basis"), str(work / "alone"))
        ),
        "peak memory of the imports, MB": peak_megabytes(IMPORTING),
    }


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what a call returns, and how many seconds it takes."""
    started_s = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started_s


def milliseconds(durations_s: list[float]) -> str:
    """Return the median of some seconds in milliseconds."""
    return f"{1e3 * statistics.median(durations_s):,.1f}"


def peak_megabytes(script: str) -> str:
    """Return the peak resident memory of a process that runs a script, mapped files included."""
    script += "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return f"{int(done.stdout.split()[1]) / 1024:,.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
