"""A store of 200 compact adapters behind vLLM's own server, over HTTP, on the CPU.

    python -m tests.vllm.serve_store .venv-vllm/bin/python

Here the files are made, and PEFT's tokens. vLLM runs in an environment of its own, which gets the wheel of
qpa-serve and nothing else of qpa; `ask_server.py` starts it there, and asks it with OpenAI's client.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.random_compact import write_adapters, write_layout
from demo.texts import diary, telegrams
from qpa.serve import load
from qpa.serve.basis import Basis
from qpa.serve.compact import Compact
from qpa.serve.layout import Layout
from tests.serving_wheel import build_wheel
from tests.tiny_models import VOCABULARY_SIZE, tiny_llama

N_ADAPTERS = 200
N_NEW = 8
N_PROMPT = 12
N_NUMBERS = 60
DATA = ("--max-length", "32", "--batch-size", "2", "--device", "cpu")
SCRIPT = Path(__file__).with_name("ask_server.py")


def make_files(work: Path) -> Path:
    """Write a tiny model, its basis, an adapter trained on it, and a store; return the trained one as a LoRA.

    The basis is calibrated on two texts, and the layout planned. The numbers of the other adapters are drawn.
    """
    model, prose, text = tiny_llama(work / "model"), work / "diary.txt", work / "telegrams.txt"
    prose.write_text(diary(0, 30))
    text.write_text(telegrams(0, 60))
    basis, run, lora = work / "basis", work / "run", work / "lora"
    qpa("basis", "--model", model, "--data", f"{prose},{text}", "--rank", 8, "--out", basis, *DATA)
    qpa("plan", "--model", model, "--basis", basis, "--max-params", N_NUMBERS, "--out", run)
    qpa("train", run, "--data", text, "--max-steps", 40, "--lr", 0.05, *DATA)
    qpa("export", run, "--format", "lora", "--out", lora)
    qpa("export", run, "--format", "compact", "--out", work / "store" / "trained")
    opened, trained = Basis.open(basis), work / "store" / "trained"
    layout = Layout.read(trained, Compact.read(trained).layout)
    names = [f"tenant-{number}" for number in range(N_ADAPTERS - 1)]
    write_adapters(work / "store", names, opened, layout)
    _damage(work / "store" / names[0], work / "store" / "damaged")
    _of_another_basis(work / "store", opened)
    return lora


def qpa(*arguments: object) -> None:
    """Run a command of qpa."""
    command = [sys.executable, "-m", "qpa.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _of_another_basis(store: Path, basis: Basis) -> None:
    """Add an adapter of a basis that the server does not have."""
    other = dataclasses.replace(basis, digest=bytes(32))
    write_adapters(store, ["foreign"], other, write_layout(store, other))


def _damage(whole: Path, damaged: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)


def peft_tokens(work: Path, lora: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Return a prompt and PEFT's greedy continuation for every adapter.

    Args:    lora: the adapter "trained" as `qpa export --format lora` wrote it.
    """
    basis = Basis.open(work / "basis")
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    rng = random.Random(0)
    found, n_as_base = {}, 0
    for file in sorted(work.glob("store/t*")):
        prompt = [rng.randrange(VOCABULARY_SIZE) for _ in range(N_PROMPT)]
        model = copy.deepcopy(base)
        adapted = (
            PeftModel.from_pretrained(model, lora)
            if file.name == "trained"
            else load(model, file, basis=basis)
        )
        found[file.name] = prompt, _greedy(adapted, prompt)
        n_as_base += found[file.name][1] == _greedy(base, prompt)
    assert len(found) == N_ADAPTERS
    assert n_as_base < N_ADAPTERS / 10, f"{n_as_base} adapters change no token"
    return found


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(N_NEW):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    continuation: list[int] = tokens[0, len(prompt) :].tolist()
    return continuation


def main() -> None:
    """Run the check in a directory that is removed after."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lora = make_files(work)
        (work / "expected.json").write_text(json.dumps(peft_tokens(work, lora)))
        site = build_wheel(work / "wheel", unpacked=True)
        command = [Path(sys.argv[1]).absolute(), SCRIPT, work]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
