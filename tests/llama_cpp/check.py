"""Export adapters for tiny models to GGUF and compare llama.cpp with the live models.

For each model, whose base llama.cpp's own converter turns into GGUF:
1. the adapter's file has the tensors that llama.cpp's own converter makes of the exported LoRA, bit by bit;
2. llama.cpp's logits and greedy tokens are the live model's, with the adapter and without;
3. the two differ for every prompt.

Run it with `python -m tests.llama_cpp.check <environment with llama.cpp and its source>`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from transformers.utils.logging import disable_progress_bar

from qpa.exporters.formats.gguf import WEIGHTS_FILE, ExportGguf
from qpa.exporters.formats.lora import ExportLora
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import (
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_phi3,
    tiny_qwen2,
    tiny_qwen3,
)

Answers = dict[str, list[dict[str, Any]]]
"""With the adapter and without, for every prompt: "logits" and "tokens"."""

FOLDER = Path(__file__).parent
N_NEW = 16
PROMPTS = tuple(
    [(start + step * i) % 96 + 33 for i in range(12)] for start, step in ((0, 5), (7, 11), (40, 3))
)
MODELS = {
    tiny_llama: ("all-linear", "lm_head"),
    tiny_mistral: ("all-linear", "lm_head"),
    tiny_qwen2: ("all-linear", "lm_head"),
    tiny_qwen3: ("all-linear", "lm_head"),
    tiny_phi3: ("all-linear", "lm_head"),
    tiny_gemma2: ("all-linear",),
    tiny_gemma3: ("all-linear",),
}
TOLERANCE = {tiny_gemma2: 2e-3, tiny_gemma3: 2e-3}
"""Largest difference of logits, in parts of the largest logit. ggml reads GELU from a table in float16."""
DEFAULT_TOLERANCE = 2e-5


class DifferenceError(Exception):
    """What is wrong, in one line."""


def main() -> int:
    """Check all models; print a line for each and the count; return the exit status."""
    environment = Path(sys.argv[1])
    disable_progress_bar()
    # peft asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    n_failed = 0
    for make_model, targets in MODELS.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            model = make_model(work / "model")
            made = random_adapter(model, work / "store", alpha=12.0, targets=targets)
            try:
                outcome = check_model(made, work, environment, TOLERANCE.get(make_model, DEFAULT_TOLERANCE))
            except DifferenceError as difference:
                outcome, n_failed = str(difference), n_failed + 1
        print(f"{make_model.__name__}: {outcome} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{len(MODELS) - n_failed} passed, {n_failed} failed")
    return 1 if n_failed else 0


def check_model(made: RandomAdapter, work: Path, environment: Path, tolerance: float) -> str:
    """Return in words how equal llama.cpp and the live model are.

    Raises:  DifferenceError: they are not.
    """
    source = environment / "source" / "vendor" / "llama.cpp"
    ExportGguf().emit(made.frozen, work / "gguf", made.context)
    ExportLora().emit(made.frozen, work / "lora", made.context)
    lora = ["--base", made.frozen.base.name_or_path, "--outtype", "f32", "--outfile", work / "lora.gguf"]
    run([sys.executable, source / "convert_lora_to_gguf.py", *lora, work / "lora"])
    compare_files(work / "lora.gguf", work / "gguf" / WEIGHTS_FILE)
    base = [source, made.frozen.base.name_or_path, work / "base.gguf"]
    run([sys.executable, FOLDER / "convert.py", *base])
    found = ask_llama_cpp(work, environment / "bin" / "python")
    return compare_answers(ask_live(made), found, tolerance)


def run(command: list[Any], request: dict[str, Any] | None = None) -> None:
    """Run a process to its end.

    Raises:  DifferenceError: it failed.
    """
    text = json.dumps(request) if request else None
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DifferenceError(f"{Path(command[1]).name} failed: {message}")


def compare_files(expected: Path, found: Path) -> None:
    """Check that two GGUF files have the same tensors, and what llama.cpp asks of an adapter's fields.

    Raises:  DifferenceError: they have not.
    """
    files = [GGUFReader(path) for path in (expected, found)]
    a, b = ({tensor.name: tensor for tensor in file.tensors} for file in files)
    if a.keys() != b.keys():
        raise DifferenceError(f"tensor {min(a.keys() ^ b.keys())} is in one file only")
    for name in a:
        if a[name].tensor_type != b[name].tensor_type or not np.array_equal(a[name].data, b[name].data):
            raise DifferenceError(f"{name} is not what llama.cpp's converter makes of it")
    for name in ("general.type", "general.architecture", "adapter.type"):
        contents = [file.fields[name].contents() for file in files]
        if contents[0] != contents[1]:
            raise DifferenceError(f"{name}: llama.cpp's converter says {contents[0]}, qpa {contents[1]}")


@torch.no_grad()
def ask_live(made: RandomAdapter) -> Answers:
    """Return the same as the engine, of the live model."""
    with_adapter = [continue_prompt(made.live, prompt) for prompt in PROMPTS]
    with made.live.disable_adapter():
        return {"base": [continue_prompt(made.live, prompt) for prompt in PROMPTS], "adapter": with_adapter}


def continue_prompt(model: Any, prompt: list[int]) -> dict[str, Any]:
    """Return one prompt's logits and its most probable next tokens."""
    tokens = list(prompt)
    logits = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    for _ in range(N_NEW):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return {"logits": logits, "tokens": tokens[len(prompt) :]}


def ask_llama_cpp(work: Path, python: Path) -> Answers:
    """Return llama.cpp's answers."""
    request = {
        "model": str(work / "base.gguf"),
        "adapter": str(work / "gguf" / WEIGHTS_FILE),
        "prompts": PROMPTS,
        "n_new": N_NEW,
        "answer": str(work / "answer.json"),
    }
    run([python, FOLDER / "engine.py"], request)
    content: Answers = json.loads((work / "answer.json").read_text())
    return content


def compare_answers(live: Answers, found: Answers, tolerance: float) -> str:
    """Return the largest differences of logits in words.

    Raises:  DifferenceError: a difference is too large, a token differs, or the adapter changes nothing.
    """
    differences = []
    for name in ("base", "adapter"):
        largest = 0.0
        for expected, answer in zip(live[name], found[name], strict=True):
            logits = np.array(answer["logits"])
            largest = max(largest, np.abs(logits - expected["logits"]).max() / np.abs(logits).max())
            if largest > tolerance:
                raise DifferenceError(f"{name} logits differ by {largest:.1e} of the largest")
            if answer["tokens"] != expected["tokens"]:
                raise DifferenceError(
                    f"{name} tokens: live {expected['tokens']}, llama.cpp {answer['tokens']}"
                )
        differences.append(f"{name} {largest:.1e}")
    for with_adapter, without in zip(found["adapter"], found["base"], strict=True):
        if with_adapter["tokens"] == without["tokens"]:
            raise DifferenceError(f"the adapter changes no token: {without['tokens']}")
    return f"equal tokens; largest difference of logits: {', '.join(differences)}"


if __name__ == "__main__":
    sys.exit(main())
