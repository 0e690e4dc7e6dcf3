"""vLLM on the CPU, in this process: a LoRA directory on the base model, or a merged directory alone.

It drops a module it does not know without a word, so what it applies is read out of its internals.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .engine import EngineRecord, Request

ENGINE = EngineRecord(
    "vllm",
    package="vllm",
    file=__file__,
    own_environment=True,
    ranks=(16, 32, 64, 128, 256, 320, 512),
)
ADAPTER_ID = 1
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """An engine that generates tokens; it gives no logits of the prompt."""

    def __init__(self, llm: Any, adapter: Any, read: set[str]) -> None:
        self.llm, self.adapter, self.read = llm, adapter, read
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []

    def logits(self, tokens: list[int]) -> None:
        """Return None: vLLM has no such interface."""

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the greedy continuation; with an adapter, see what became of its modules first."""
        tokens = self._generate(prompt, n_new)
        if self.adapter is not None:
            self.missing_keys = sorted(_modules_of(self.adapter.lora_path) - self.read)
            self.unexpected_keys = _dropped_modules(self.llm)
        return tokens

    def _generate(self, prompt: list[int], n_new: int) -> list[int]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt}], parameters, lora_request=self.adapter, use_tqdm=False
        )
        return list(outputs[0].outputs[0].token_ids)


def open_engine(request: Request) -> VllmEngine:
    """Start vLLM on the directory of a request, in float32."""
    served = None if request["merges"] else _served_rank(Path(request["directory"]))
    os.environ.update(ENVIRONMENT)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "trust_remote_code": request["trust_remote_code"],
    }
    if served is None:
        return VllmEngine(LLM(request["directory"], **options), None, set())
    read = _record_modules()
    options |= {"revision": request["revision"], "enable_lora": True, "max_lora_rank": served}
    llm = LLM(request["model"], **options)
    return VllmEngine(llm, LoRARequest("adapter", ADAPTER_ID, request["directory"]), read)


def _served_rank(directory: Path) -> int:
    """Return the smallest `max_lora_rank` that vLLM knows and that a LoRA directory fits in.

    Raises:  ValueError: its rank is larger than all of them.
    """
    rank: int = json.loads((directory / "adapter_config.json").read_bytes())["r"]
    served = next((choice for choice in ENGINE.ranks if choice >= rank), None)
    if served is None:
        raise ValueError(f"vLLM serves ranks up to {ENGINE.ranks[-1]}, and this LoRA has rank {rank}")
    return served


def _record_modules() -> set[str]:
    """Return a set that fills with the module paths vLLM reads from an adapter, before it packs them."""
    from vllm.lora import lora_model

    read: set[str] = set()
    original = lora_model.parse_fine_tuned_lora_name

    def recording(name: str, *arguments: Any, **options: Any) -> Any:
        parsed = original(name, *arguments, **options)
        read.add(parsed[0])
        return parsed

    lora_model.parse_fine_tuned_lora_name = recording
    return read


def _modules_of(directory: str) -> set[str]:
    from safetensors import safe_open

    with safe_open(Path(directory) / "adapter_model.safetensors", framework="numpy") as reader:
        keys: list[str] = reader.keys()
    return {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}


def _dropped_modules(llm: Any) -> list[str]:
    """Return the modules that were read from the adapter and are applied nowhere."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    worker = getattr(worker, "worker", worker)
    manager = worker.model_runner.lora_manager._adapter_manager
    return sorted(set(manager._registered_adapters[ADAPTER_ID].loras) - set(manager.modules))
