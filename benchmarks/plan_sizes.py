"""What planning costs for mixtures of full size: seconds of processor time and peak memory of `qpa plan`.

The configs have the published shapes of the models, and nothing else of them; there are no weights.

    python -m benchmarks.plan_sizes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from benchmarks.paired import markdown

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Mixtral-8x7B": (MixtralConfig, {"num_local_experts": 8, "num_hidden_layers": 32}),
    "gpt-oss-20b": (GptOssConfig, {"num_local_experts": 32, "num_hidden_layers": 24}),
    "Llama-4-Scout, text": (Llama4TextConfig, {"num_local_experts": 16, "num_hidden_layers": 48}),
    "Qwen3-Next-80B": (Qwen3NextConfig, {"num_experts": 512, "num_hidden_layers": 48}),
    "DeepSeek-V3": (DeepseekV3Config, {"n_routed_experts": 256, "num_hidden_layers": 61}),
}
"""The classes' own defaults are the models' shapes; what is given here says which size it is."""


def main() -> int:
    """Plan for each and print a table."""
    rows = []
    for name, (kind, shape) in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            kind(**shape).save_pretrained(Path(folder) / "model")
            for targets in ("all-linear", "attention"):
                rows.append((name, targets, *plan(Path(folder), targets)))
                print(*rows[-1], file=sys.stderr)
    columns = ("model", "targets", "layers", "numbers of the LoRA", "processor, s", "memory, MB")
    print(markdown(columns, rows))
    return 0


def plan(folder: Path, targets: str) -> tuple[str, ...]:
    """Return adapted layers, numbers of the adapter, seconds and megabytes."""
    command = [sys.executable, "-m", "qpa.cli", "plan", "--model", str(folder / "model"), "--json"]
    command += ["--targets", targets, "--out", str(folder / targets)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    n_numbers = json.loads(output)["account"]["n_adapter"]
    spec = json.loads((folder / targets / "adapter-spec.json").read_bytes())
    n_layers = len({tensor["module"] for tensor in spec["tensors"]})
    seconds = usage.ru_utime + usage.ru_stime
    return f"{n_layers:,}", f"{n_numbers:,}", f"{seconds:.0f}", f"{usage.ru_maxrss / 1024:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
