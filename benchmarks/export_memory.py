"""What an export of a large adapter costs: memory above the process's own, and time against a plain save.

The adapter is synthetic: random numbers for the modules of a model with hidden size 4096, rank 256, written
a tensor at a time, with the document of a frozen adapter. It is exported as `lora`.

Memory: a process of its own imports everything, exports once, and reports its peak resident memory
(VmHWM of Linux, reset before the export) above what was resident before. Time: in one process, in turns, the
export and one safetensors.numpy.save_file of the same tensors, which are in memory already, without and with
a sync to the disk. The export reads its source twice, once for its digest, and digests and syncs its files.

    python -m benchmarks.export_memory
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paired import markdown
from qpa.adapters.registry import DEFAULT
from qpa.compat.peft_ import WEIGHTS_FILE
from qpa.documents import (
    BaseModelReference,
    FrozenAdapter,
    ParameterAccount,
    Provenance,
    TensorRef,
    TrainingResult,
)
from qpa.exporters.formats.lora import ExportLora
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore
from qpa.store.tensor_file import Array, TensorFile, TensorPlan, write_tensors

HIDDEN_SIZE = 4096
RANK = 256
N_MODULE_BYTES = 2 * RANK * HIDDEN_SIZE * 4
DOCUMENT_FILE = "frozen-adapter.json"


def main() -> None:
    """Make the adapter, measure in two processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where there is room for four times the adapter")
    parser.add_argument("--measure", choices=("memory", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "memory":
        print(json.dumps(measure_memory(options.folder)))
        return
    if options.measure == "time":
        print(json.dumps(measure_time(options.folder, options.rounds)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_adapter(Path(folder), max(1, round(options.gigabytes * 1e9 / N_MODULE_BYTES)))
        memory = _in_a_process("memory", Path(folder), options.rounds)
        durations_s = _in_a_process("time", Path(folder), options.rounds)
    print(_table(memory, durations_s))


def write_adapter(folder: Path, n_modules: int) -> None:
    """Write the arrays and the document of a frozen adapter of random numbers."""
    random = np.random.default_rng(0)
    tensors = tuple(
        TensorRef(module=f"model.layers.{index}.self_attn.o_proj", role=role, shape=shape)
        for index in range(n_modules)
        for role, shape in (("lora_A", (RANK, HIDDEN_SIZE)), ("lora_B", (HIDDEN_SIZE, RANK)))
    )
    shapes = {tensor.path: tensor.shape for tensor in tensors}
    plans = [TensorPlan(name, "F32", shape) for name, shape in shapes.items()]

    def normal(name: str) -> Array:
        return random.standard_normal(shapes[name], dtype=np.float32)

    arrays = write_tensors(folder / "arrays.safetensors", plans, normal)
    probe = write_tensors(folder / "probe.safetensors", [], normal)
    frozen = FrozenAdapter(
        provenance=Provenance(pass_name="freeze-adapter", options=(), seed=0, qpa_version="0", parents=()),
        base=BaseModelReference(
            name_or_path="owner/base",
            revision=None,
            config_digest="sha256:" + "0" * 64,
            model_type="llama",
            architecture="LlamaForCausalLM",
            head="lm_head",
            ties_lm_head=False,
            trust_remote_code=False,
        ),
        method=DEFAULT,
        rank=RANK,
        alpha=2.0 * RANK,
        target_modules=("o_proj",),
        target_parameters=(),
        fan_in_fan_out=False,
        tensors=tensors,
        arrays=arrays,
        probe=probe,
        source="exact",
        shots=None,
        weight_error=0.0,
        frozen_loss=None,
        generator="spectral",
        context=None,
        account=ParameterAccount(
            n_angles=24,
            n_control=0,
            n_program=0,
            n_decoder=1200,
            n_own=0,
            n_adapter=n_modules * 2 * RANK * HIDDEN_SIZE,
        ),
        result=TrainingResult(
            n_steps=1,
            frozen_step=1,
            objective="sft",
            scores=(),
            quantization=None,
            n_train_tokens=1,
            n_eval_tokens=1,
            base_loss=1.0,
            eval_loss=1.0,
            data_digest="sha256:" + "0" * 64,
        ),
    )
    (folder / DOCUMENT_FILE).write_bytes(frozen.to_json())


def measure_memory(folder: Path) -> dict[str, int]:
    """Export once; return resident bytes before it, and at most during it."""
    export = _exporting(folder)
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = _status_bytes("VmRSS")
    out = export()
    return {
        "before_bytes": before_bytes,
        "peak_bytes": _status_bytes("VmHWM"),
        "file_bytes": (out / WEIGHTS_FILE).stat().st_size,
    }


def measure_time(folder: Path, n_rounds: int) -> dict[str, list[float]]:
    """Return seconds of the export and of save_file, in turns; who goes first rotates."""
    from safetensors.numpy import save_file

    file = TensorFile.open(folder / "arrays.safetensors")
    tensors = {name: file.read(name) for name in file.entries}
    plain = folder / "plain"

    def save() -> Path:
        plain.mkdir()
        save_file(tensors, plain / WEIGHTS_FILE)
        return plain

    def save_and_sync() -> Path:
        with (save() / WEIGHTS_FILE).open("rb") as stream:
            os.fsync(stream.fileno())
        return plain

    turns = [("export", _exporting(folder)), ("save_file", save), ("save_file and sync", save_and_sync)]
    durations_s: dict[str, list[float]] = {name: [] for name, _ in turns}
    for _ in range(n_rounds):
        for name, call in turns:
            durations_s[name].append(_duration_s(call))
        turns.append(turns.pop(0))
    return durations_s


def _exporting(folder: Path) -> Callable[[], Path]:
    """Return a function that exports the adapter and returns the directory it has made."""
    frozen = FrozenAdapter.from_json((folder / DOCUMENT_FILE).read_bytes(), DOCUMENT_FILE)
    context, out = PassContext(seed=0, files=DirectoryStore(folder)), folder / "out"

    def export() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        ExportLora().emit(frozen, out, context)
        return out

    return export


def _duration_s(call: Callable[[], Path]) -> float:
    started_s = time.perf_counter()
    made = call()
    duration_s = time.perf_counter() - started_s
    shutil.rmtree(made)
    return duration_s


def _status_bytes(field: str) -> int:
    """Return a field of /proc/self/status that is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status: no {field}, which this benchmark reads; it needs Linux")


def _in_a_process(measure: str, folder: Path, n_rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.export_memory", "--measure", measure]
    command += ["--folder", str(folder), "--rounds", str(n_rounds)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def _table(memory: dict[str, int], durations_s: dict[str, list[float]]) -> str:
    above_bytes = memory["peak_bytes"] - memory["before_bytes"]
    rows = [
        ("adapter on disk", f"{memory['file_bytes'] / 1e6:.0f} MB"),
        ("resident before the export", f"{memory['before_bytes'] / 1e6:.0f} MB"),
        ("peak above that", f"{above_bytes / 1e6:.1f} MB"),
        *((f"{name}, median", f"{statistics.median(values):.2f} s") for name, values in durations_s.items()),
        *((f"export / {name}", _ratio(durations_s, name)) for name in durations_s if name != "export"),
    ]
    return markdown((f"lora, {len(durations_s['export'])} rounds", "measured"), rows)


def _ratio(durations_s: dict[str, list[float]], name: str) -> str:
    """Write the median of the rounds' ratios, with the least and the greatest."""
    ratios = [a / b for a, b in zip(durations_s["export"], durations_s[name], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


if __name__ == "__main__":
    main()
