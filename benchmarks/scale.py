"""A model of Qwen3's shape with random weights goes through every command: how much memory and time it takes.

The shapes are those of Qwen3-0.6B and Qwen3-1.7B (public config.json files), the weights are random and in
bfloat16, and the tokenizer is the demonstration's, so losses mean nothing; a step costs what it would cost.
Each command is a process of its own. Its time is that from start to end, with imports; its memory is the peak
resident memory (VmHWM, Linux) of the largest of its processes, as verifying starts another.

    python -m benchmarks.scale                            plan, train, export, verify at the shape of 0.6B
    python -m benchmarks.scale --shape 1.7b --until calibrate
    python -m benchmarks.scale --keep <directory>         leave model and run there, for benchmarks.step_time

With `--until calibrate` nothing is trained: the planned adapter is attached and calibrated, as before a
training's first step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paired import markdown

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144},
}
COMMON = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
POLL_S = 0.05


@dataclass(frozen=True)
class Cost:
    """What a process needed: its time, and its peak resident memory."""

    seconds: float
    peak_bytes: int


def main() -> None:
    """Run the commands and print what each of them costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.6b")
    parser.add_argument("--until", choices=("plan", "calibrate", "verify"), default="verify")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="Directory for model and run, which are removed otherwise.")
    parser.add_argument("--work", choices=("model", "calibrate"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options)
        return
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
        print(_table(Path(folder), options))


def _table(folder: Path, options: argparse.Namespace) -> str:
    model, run, export = folder / "model", folder / "run", folder / "export"
    again = ["--shape", options.shape, "--max-length", str(options.max_length), "--keep", str(folder)]
    this = ["-m", "benchmarks.scale", *again, "--batch-size", str(options.batch_size)]
    rows = [
        "--max-length",
        options.max_length,
        "--batch-size",
        options.batch_size,
        "--bf16",
        "--device",
        "cpu",
    ]
    qpa = ["-m", "qpa.cli"]
    commands = {
        "plan": [*qpa, "plan", "--model", model, "--out", run, "--force"],
        "attach and calibrate": [*this, "--work", "calibrate"],
        "train": [*qpa, "train", run, "--data", model / "text.txt", "--max-steps", options.steps, *rows],
        "export": [*qpa, "export", run, "--format", "lora", "--out", export, "--force"],
        "verify": [*qpa, "verify", export],
    }
    last = "attach and calibrate" if options.until == "calibrate" else options.until
    if options.until == "verify":
        del commands["attach and calibrate"]
    if not (model / "config.json").is_file():
        measure([*this, "--work", "model"])
    table = []
    for name, command in commands.items():
        cost = measure([str(word) for word in command])
        table.append((name, f"{cost.seconds:.0f}", f"{cost.peak_bytes / 1e9:.2f}"))
        print(f"{name}: {cost.seconds:.0f} s, {cost.peak_bytes / 1e9:.2f} GB", file=sys.stderr)
        if name == last:
            break
    return markdown((f"Qwen3-{options.shape}'s shape", "time, s", "peak memory, GB"), table)


def measure(arguments: list[str]) -> Cost:
    """Run Python with arguments in a process of its own.

    Raises:  CalledProcessError: it fails.
    """
    started_s = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=os.environ)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, *map(_peak_of, _family(process.pid)))
        time.sleep(POLL_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return Cost(time.monotonic() - started_s, peak_bytes)


def _family(pid: int) -> list[int]:
    """Return a process and all that it has started, directly or not."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(fields["VmHWM"].split()[0]) if "VmHWM" in fields else 0


def _work(options: argparse.Namespace) -> None:
    (_write_model if options.work == "model" else _calibrate)(options)


def _write_model(options: argparse.Namespace) -> None:
    """Write a model of random bfloat16 weights, a tokenizer and a text."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from demo.build_model import train_tokenizer
    from demo.texts import diary

    folder = options.keep / "model"
    text = diary(0, 120)
    tokenizer = train_tokenizer(text)
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen3Config(**COMMON, **SHAPES[options.shape], **ends)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(text)


def _calibrate(options: argparse.Namespace) -> None:
    """Do what a training does before its first step."""
    from qpa.documents import LogicalCircuit
    from qpa.passes.train_generator import TrainGenerator
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.store.run_directory import RunDirectory
    from qpa.training.preparation import prepare
    from qpa.training.session import calibrate

    run = RunDirectory(options.keep / "run")
    context = PassContext(0, run.files, run.read_through(LogicalCircuit))
    step = TrainGenerator(
        data=(str(options.keep / "model" / "text.txt"),),
        max_length=options.max_length,
        batch_size=options.batch_size,
        bf16=True,
        device="cpu",
    )
    calibrate(prepare(step, context.provenance(step, context.document(LogicalCircuit)), context))


if __name__ == "__main__":
    main()
