"""The process in vLLM's environment: greedy tokens with and without an adapter, and what was dropped.

It imports nothing of qpa. The request is JSON on stdin, the answer a JSON file the request names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora import lora_model
from vllm.lora.request import LoRARequest

ADAPTER_ID = 1


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    read = record_modules()
    llm = LLM(
        request["model"],
        enable_lora=True,
        max_lora_rank=16,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    lora = LoRARequest("adapter", ADAPTER_ID, request["adapter"])
    answer = {
        "base": generate(llm, request, None),
        "adapter": generate(llm, request, lora),
        "dropped": dropped_modules(llm),
        "read": sorted(read),
    }
    Path(request["answer"]).write_text(json.dumps(answer))


def record_modules() -> set[str]:
    """Return a set that fills with the module paths vLLM reads from an adapter, before it packs them."""
    read: set[str] = set()
    original = lora_model.parse_fine_tuned_lora_name

    def recording(name: str, *arguments: Any, **options: Any) -> Any:
        parsed = original(name, *arguments, **options)
        read.add(parsed[0])
        return parsed

    lora_model.parse_fine_tuned_lora_name = recording
    return read


def generate(llm: LLM, request: dict[str, Any], lora: LoRARequest | None) -> list[list[int]]:
    """Return the greedy continuation of every prompt."""
    parameters = SamplingParams(
        temperature=0.0, max_tokens=request["n_new"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(prompts, parameters, lora_request=lora, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def dropped_modules(llm: LLM) -> list[str]:
    """Return the modules that were read from the adapter and are applied nowhere."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    worker = getattr(worker, "worker", worker)
    manager = worker.model_runner.lora_manager._adapter_manager
    return sorted(set(manager._registered_adapters[ADAPTER_ID].loras) - set(manager.modules))


if __name__ == "__main__":
    main()
