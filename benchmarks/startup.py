"""How long `qpa --help` and `qpa plan` take from a cold process, and what they import.

Measured: wall time of the command as a user types it, in a process of its own, and the CPU time of that
process, which other programs disturb less; median and quartiles of `--repeats` runs after one that warms the
disk cache, the commands in turn. Peak resident memory is that process's ru_maxrss, the largest of the runs. A
child's ru_maxrss is at least its parent's, so this script imports nothing large, and refuses a figure that
could be its own. The plan is for the shape of a 70B Llama (80 layers, hidden 8192, vocabulary 128256), of
which there is a config.json and nothing else. The last row is the least that this plan can take: it imports
transformers' class of the model, and torch with it, while the garbage collector is paused, as the plan does.
The imports are those of one more run under `python -X importtime`, which slows it down: read the shares, not
the sums.

Targets: --help 0.3 s and without torch; plan 3 s and 1 GB.

    python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks.paired import markdown, spread

QPA = str(Path(sys.executable).with_name("qpa"))
N_PACKAGES = 10
IMPORT_MODEL_CLASS = "import gc; gc.disable(); from transformers import LlamaForCausalLM; gc.freeze()"
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


class Run(NamedTuple):
    """One process: wall and CPU time, peak resident memory, and what it wrote to stderr."""

    duration_s: float
    cpu_s: float
    peak_bytes: int
    stderr: str


def main() -> None:
    """Measure both commands and print their tables."""
    parser = argparse.ArgumentParser(description="Time the start of the qpa command.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "llama-70b")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA_70B))
        plan = ("plan", "--model", str(model), "--out", str(Path(folder, "run")), "--force")
        commands = {"qpa --help": ("--help",), "qpa plan, 70B Llama": plan}
        processes = {name: (QPA, *arguments) for name, arguments in commands.items()}
        processes["import of the model's class"] = (sys.executable, "-c", IMPORT_MODEL_CLASS)
        print(_times(processes, repeats))
        for name, arguments in commands.items():
            print(f"\n{name}\n")
            print(_imports(arguments))


def _times(processes: dict[str, tuple[str, ...]], repeats: int) -> str:
    rounds = [{name: _run(*command) for name, command in processes.items()} for _ in range(repeats + 1)]
    rows = []
    for name in processes:
        runs = [each[name] for each in rounds[1:]]
        wall_s, cpu_s = (
            spread([getattr(run, field) for run in runs]).text() for field in ("duration_s", "cpu_s")
        )
        rows.append((name, wall_s, cpu_s, f"{max(run.peak_bytes for run in runs) / 1e6:.0f} MB"))
    return markdown(("command", "wall time, s", "CPU time, s", "peak memory"), rows)


def _imports(arguments: tuple[str, ...]) -> str:
    """Return a table of the packages whose modules take longest, by their own time."""
    listing = _run(sys.executable, "-X", "importtime", QPA, *arguments).stderr
    self_us, n_modules = Counter[str](), Counter[str]()
    for line in listing.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[0].strip().isdigit():
            package = fields[2].strip().partition(".")[0]
            self_us[package] += int(fields[0])
            n_modules[package] += 1
    total_us = sum(self_us.values())
    rows = [
        (package, f"{n_modules[package]}", f"{us / 1e3:.0f}", f"{100 * us / total_us:.0f} %")
        for package, us in self_us.most_common(N_PACKAGES)
    ]
    rows.append(("all", f"{n_modules.total()}", f"{total_us / 1e3:.0f}", "100 %"))
    table = markdown(("package", "modules", "own import time, ms", "share"), rows)
    return f"torch imported: {'yes' if 'torch' in self_us else 'no'}\n\n{table}"


def _run(*command: str) -> Run:
    """Run a command to its end.

    Raises:  CalledProcessError: it fails.
             RuntimeError: its peak memory cannot be told from this process's.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as stderr:
        started_s = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        duration_s = time.perf_counter() - started_s
        child.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        output = stderr.read()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, stderr=output)
    own_units = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if usage.ru_maxrss <= own_units:
        raise RuntimeError(
            f"peak memory of {command[0]}: not above this process's own, so it may be inherited"
        )
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(duration_s, usage.ru_utime + usage.ru_stime, peak_bytes, output)


if __name__ == "__main__":
    main()
