"""From nothing to a verified adapter, with the commands a user would type.

    python -m demo.run

Builds a small base model (`demo.build_model`), adapts it to telegrams with `qpa plan`, `train`, `export` and
`verify`, and ends in one table. Writes runs/demo, runs/demo-base, runs/demo-text and adapters/demo, and
replaces them when run again. No network. Exit code 0 only when the adapted loss is below the base loss and
PEFT and transformers continue the prompt with the live model's own tokens.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demo.texts import telegrams

BASE = "./runs/demo-base"
RUN = "runs/demo"
ADAPTER = "adapters/demo"
TRAINING_TEXT = Path("runs/demo-text/telegrams.txt")
HELD_OUT_TEXT = Path("runs/demo-text/telegrams-held-out.txt")
PROBE = Path(ADAPTER, "qpa/probe.safetensors")

Rows = list[tuple[str, str]]


def main() -> int:
    """Run the demonstration; return the exit code."""
    started_s = time.monotonic()
    # So small a model is fastest on one thread, above all where other programs want the cores too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        answers = run_commands()
    except subprocess.CalledProcessError as error:
        print(f"the command failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    rows, passed = summary(answers)
    rows.append(("all of this took", f"{time.monotonic() - started_s:.0f} s"))
    print_table(rows)
    return 0 if passed else 1


def run_commands() -> dict[str, Any]:
    """Build the base model and the texts, run the commands; return what they answered in JSON."""
    command("python", "-m", "demo.build_model", BASE)
    write_texts()
    command("qpa", "plan", "--model", BASE, "--rank", "8", "--out", RUN, "--force")
    data = ("--data", str(TRAINING_TEXT), "--eval-data", str(HELD_OUT_TEXT))
    size = ("--max-length", "64", "--max-steps", "200")
    train = command("qpa", "train", RUN, *data, *size, "--force", "--json")
    command("qpa", "export", RUN, "--format", "lora", "--out", ADAPTER, "--force")
    verify = command("qpa", "verify", ADAPTER, "--json")
    return {**json.loads(train), **json.loads(verify)}


def write_texts() -> None:
    """Write the telegrams to adapt to, and others, drawn with another seed, to measure on."""
    TRAINING_TEXT.parent.mkdir(parents=True, exist_ok=True)
    TRAINING_TEXT.write_text(telegrams(seed=0, n_lines=3000))
    HELD_OUT_TEXT.write_text(telegrams(seed=1, n_lines=200))
    example = HELD_OUT_TEXT.read_text().splitlines()[0]
    print(f"\nwrote {TRAINING_TEXT} and {HELD_OUT_TEXT}; the first telegram: {example}")


def command(program: str, *arguments: str) -> str:
    """Echo a command, run it with the programs of this environment, and return its stdout.

    The output is shown too, unless it is JSON.

    Raises:  CalledProcessError: it fails; its stderr is on the terminal.
    """
    print(f"\n$ {shlex.join((program, *arguments))}", flush=True)
    executable = sys.executable if program == "python" else str(Path(sys.executable).with_name(program))
    done = subprocess.run((executable, *arguments), stdout=subprocess.PIPE, text=True, check=True)
    if "--json" not in arguments:
        print(done.stdout, end="", flush=True)
    return done.stdout


def summary(answers: dict[str, Any]) -> tuple[Rows, bool]:
    """Return the table's rows, and whether everything the demonstration claims is so.

    Args:    answers: the objects printed by `qpa train --json` and `qpa verify --json`, in one.
    """
    account, result = answers["account"], answers["result"]
    prompt, live = read_probe()
    tokens = {"live model": live} | {e["engine"]: tuple(e["greedy_tokens"]) for e in answers["engines"]}
    is_same = {"peft", "transformers"} <= tokens.keys() and len(set(tokens.values())) == 1
    is_better = result["eval_loss"] < result["base_loss"]
    rows = [
        ("base loss, perplexity", f"{result['base_loss']:.3f}  {result['base_perplexity']:.2f}"),
        ("adapted loss, perplexity", f"{result['eval_loss']:.3f}  {result['eval_perplexity']:.2f}"),
        ("LoRA's parameters", f"{account['n_adapter']:,}"),
        ("the generator's", f"{account['n_generator']:,}  ({account['percent']:.1f} %)"),
        ("prompt", text_of(prompt)),
        *((f"greedy, {reader}", text_of(ids)) for reader, ids in tokens.items()),
        ("the same tokens", "yes" if is_same else "NO"),
    ]
    return rows, is_same and is_better


def read_probe() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the exported probe's prompt, and how the model in training continued it."""
    from safetensors import safe_open

    with safe_open(PROBE, framework="numpy") as reader:
        prompt, greedy = (tuple(reader.get_tensor(name).tolist()) for name in ("input_ids", "greedy"))
    return prompt, greedy


def text_of(tokens: tuple[int, ...]) -> str:
    """Return tokens as text on one line."""
    from tokenizers import Tokenizer

    text: str = Tokenizer.from_file(f"{BASE}/tokenizer.json").decode(list(tokens))
    return text.strip().replace("\n", " / ")


def print_table(rows: Rows) -> None:
    """Print rows of a name and a value."""
    width = max(len(name) for name, _ in rows)
    print("\nA diary's model, adapted to telegrams (losses in nats per token, on held-out telegrams)\n")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
