"""Export adapters for tiny models and compare vLLM's greedy tokens with PEFT's and the base model's.

"It loads" proves nothing: vLLM drops a module it does not know without a word. So for each model:
1. vLLM's tokens with the adapter are PEFT's, its tokens without are the base model's;
2. the two differ for every prompt;
3. vLLM applies every module it read, and reads every module of the file.

Run it with `python -m tests.vllm.check <python of the environment with vLLM>`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from qpa.exporters.lora import ExportLora
from qpa.exporters.lora_contract import WEIGHTS_FILE, check_lora_contract, module_of
from tests.random_adapter import random_adapter
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen3

ENGINE = Path(__file__).with_name("engine.py")
N_NEW = 16
PROMPTS = tuple(
    [(start + step * i) % 96 + 33 for i in range(12)] for start, step in ((0, 5), (7, 11), (40, 3))
)
MODELS: tuple[Callable[[Path], Path], ...] = (tiny_llama, tiny_qwen3, tiny_gemma2)

# vLLM in one process, without binding its threads to cores that a container may not own.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Check all models; print a line for each and the count; return the exit status."""
    python = sys.argv[1]
    disable_progress_bar()
    # peft asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    n_failed = 0
    for make_model in MODELS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            problem = check_model(make_model, Path(work), python)
        n_failed += problem is not None
        duration_s = time.monotonic() - started
        print(f"{make_model.__name__}: {problem or 'equal to PEFT'} ({duration_s:.1f} s)", flush=True)
    print(f"{len(MODELS) - n_failed} passed, {n_failed} failed")
    return 1 if n_failed else 0


def check_model(make_model: Callable[[Path], Path], work: Path, python: str) -> str | None:
    """Return what is wrong with one model's adapter in vLLM, None when nothing is."""
    model, adapter = make_model(work / "model"), work / "adapter"
    made = random_adapter(model, work / "store", rank=4, alpha=12.0)
    ExportLora().emit(made.frozen, adapter, made.context)
    if findings := check_lora_contract(adapter):
        return str(findings[0])
    expected = ask_peft(model, adapter)
    try:
        found = ask_vllm(model, adapter, python)
    except subprocess.CalledProcessError as error:
        return "vLLM failed: " + (error.stderr.strip().splitlines() or ["no message"])[-1]
    return compare(expected, found, modules_of(adapter))


def compare(expected: dict[str, Any], found: dict[str, Any], modules: set[str]) -> str | None:
    """Return the first difference between PEFT's and vLLM's answers."""
    if dropped := found["dropped"]:
        return f"vLLM dropped {len(dropped)} modules, the first {dropped[0]}"
    if unread := sorted(modules - set(found["read"])):
        return f"vLLM did not read {len(unread)} modules, the first {unread[0]}"
    for name in ("base", "adapter"):
        if found[name] != expected[name]:
            return f"{name} tokens: PEFT {expected[name]}, vLLM {found[name]}"
    for with_adapter, without in zip(found["adapter"], found["base"], strict=True):
        if with_adapter == without:
            return f"the adapter changes no token: {without}"
    return None


def modules_of(adapter: Path) -> set[str]:
    """Return the paths of the modules that have tensors."""
    return {module_of(key) for key in load_file(adapter / WEIGHTS_FILE)}


@torch.no_grad()
def ask_peft(model: Path, adapter: Path) -> dict[str, list[list[int]]]:
    """Return greedy continuations of the prompts, by transformers and PEFT in float32."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = {"base": [greedy(base, prompt) for prompt in PROMPTS]}
    with_adapter = PeftModel.from_pretrained(base, adapter).eval()
    answers["adapter"] = [greedy(with_adapter, prompt) for prompt in PROMPTS]
    return answers


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Return the most probable next token, `N_NEW` times."""
    tokens = list(prompt)
    for _ in range(N_NEW):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def ask_vllm(model: Path, adapter: Path, python: str) -> dict[str, Any]:
    """Return vLLM's continuations and what became of the adapter's modules."""
    answer = adapter.with_name("answer.json")
    request = {
        "model": str(model),
        "adapter": str(adapter),
        "prompts": PROMPTS,
        "n_new": N_NEW,
        "answer": str(answer),
    }
    subprocess.run(
        [python, str(ENGINE)],
        input=json.dumps(request),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        check=True,
    )
    content: dict[str, Any] = json.loads(answer.read_text())
    return content


if __name__ == "__main__":
    sys.exit(main())
